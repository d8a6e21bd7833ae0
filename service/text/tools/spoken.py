"""What a parser makes of a model's words: text, and calls of tools in pieces.

`CallObject` reads the form that most formats share, one JSON object per call. Invariants, for whatever a model writes:
no exception; the same text and calls however the words are cut into pieces; time linear in their number. Words that
turn out to be no call are text, markers as they are spelled; nothing is lost but white space between calls.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Collection

from service.text.chat import ToolCallDelta
from service.text.check import FUNCTION_NAME

WHITE = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")  # Mistral and Hermes; Llama
_LAYOUT = ("name", *_ARGUMENTS, "type", "id")


class Spoken:
    """Text and calls that nobody has taken yet.

    Args:
        new_id: makes the id of a call that brings none.
        only_one: the end of the first call is the end of everything.

    Attributes:
        calls: how many have begun.
        closed: `only_one` has ended; what comes after is ignored.
    """

    def __init__(self, new_id: Callable[[], str], *, only_one: bool = False) -> None:
        self.calls = 0
        self.closed = False
        self._new_id = new_id
        self._only_one = only_one
        self._text: list[str] = []
        self._deltas: list[ToolCallDelta] = []
        self._arguments: list[str] = []

    def say(self, text: str) -> None:
        if not self.closed:
            self._text.append(text)

    def begin(self, name: str, call_id: str = "") -> None:
        """A call whose name is known."""
        if not self.closed:
            self._settle()
            self._deltas.append(ToolCallDelta(call=self.calls, id=call_id or self._new_id(), name=name))
            self.calls += 1

    def argue(self, text: str) -> None:
        """More of the arguments of the call that began last."""
        if not self.closed:
            self._arguments.append(text)

    def end(self) -> None:
        """The call that began last is complete."""
        self.closed = self._only_one

    def take(self) -> tuple[str, list[ToolCallDelta]]:
        """What has come since the last time; the arguments of one call in one piece."""
        self._settle()
        text, deltas = "".join(self._text), self._deltas
        self._text, self._deltas = [], []
        return text, deltas

    def _settle(self) -> None:
        if not self._arguments:
            return
        text, self._arguments = "".join(self._arguments), []
        last = self._deltas.pop() if self._deltas else ToolCallDelta(call=self.calls - 1)
        self._deltas.append(ToolCallDelta(call=last.call, id=last.id, name=last.name, arguments=last.arguments + text))


class Place(enum.Enum):
    """Where a character stands: inside a value, as its last one, or behind it."""

    INSIDE = enum.auto()
    LAST = enum.auto()
    BEHIND = enum.auto()


class JsonValue:
    """Finds the end of one JSON value: the quote or bracket that closes it; for numbers and words what cannot be part
    of them. What is inside is not looked at, so a call may have arguments that are no JSON, as OpenAI's may."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = self._in_word = False

    def step(self, char: str) -> Place:
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
                return self._closed()
            return Place.INSIDE
        if self._in_word and (char in WHITE or char in ',:]}"[{'):
            return Place.BEHIND
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            if not self._depth:
                return Place.BEHIND
            self._depth -= 1
            return self._closed()
        elif not self._depth:
            if char in ",:":
                return Place.BEHIND
            self._in_word = True
        return Place.INSIDE

    def _closed(self) -> Place:
        return Place.INSIDE if self._depth else Place.LAST


class Outcome(enum.Enum):
    MORE = enum.auto()
    CALL = enum.auto()
    NO_CALL = enum.auto()


class CallObject:
    """One call, `{"name": …, "arguments": {…}}`, character by character. Keys may stand in any order; the name is told
    as soon as it is complete, and from then on the arguments as they come, exactly as they are written.

    What does not fit this form before the name is known makes all of it text. After that the call stands as far as it
    was told, and the words from there on are text.

    Args:
        spoken: hears of the call, or of the text that is none.
        before: text in front of the object that belongs to it, a marker for instance.
        offered: names that make an object a call, and none of its keys may be foreign. None = any name: something
            else told that this is a call.
    """

    def __init__(self, spoken: Spoken, before: str = "", offered: Collection[str] | None = None) -> None:
        self._spoken = spoken
        self._offered = offered
        self._raw = [before]  # while the name is unknown
        self._named = False
        self._early: list[str] = []  # arguments that came before the name
        self._argued = False
        self._state: Callable[[str], Outcome] = self._opening
        self._string: list[str] = []
        self._escaped = False
        self._key = ""
        self._value = JsonValue()
        self._shown = False

    def step(self, char: str) -> Outcome:
        if not self._named:
            self._raw.append(char)
        outcome = self._state(char)
        if outcome is Outcome.CALL:
            self._spoken.end()
        elif outcome is Outcome.NO_CALL:
            self._spoken.say(char if self._named else "".join(self._raw))
        return outcome

    def abandon(self) -> None:
        """The words end here, or something else begins."""
        if not self._named:
            self._spoken.say("".join(self._raw))

    # -- states: each takes the next character -----------------------------------------------------------------

    def _opening(self, char: str) -> Outcome:
        if char in WHITE:
            return Outcome.MORE
        return self._go(self._before_first_key) if char == "{" else Outcome.NO_CALL

    def _before_first_key(self, char: str) -> Outcome:
        return self._close() if char == "}" else self._before_key(char)

    def _before_key(self, char: str) -> Outcome:
        if char in WHITE:
            return Outcome.MORE
        return self._begin_string(self._in_key) if char == '"' else Outcome.NO_CALL

    def _in_key(self, char: str) -> Outcome:
        if not self._string_ends(char):
            return Outcome.MORE
        key = self._text()
        if key is None or (self._offered is not None and key not in _LAYOUT):
            return Outcome.NO_CALL
        self._key = key
        return self._go(self._before_colon)

    def _before_colon(self, char: str) -> Outcome:
        if char in WHITE:
            return Outcome.MORE
        return self._go(self._before_value) if char == ":" else Outcome.NO_CALL

    def _before_value(self, char: str) -> Outcome:
        if char in WHITE:
            return Outcome.MORE
        if self._key == "name" and not self._named:
            return self._begin_string(self._in_name) if char == '"' else Outcome.NO_CALL
        self._shown = self._key in _ARGUMENTS and not self._argued
        self._value = JsonValue()
        self._state = self._in_value
        return self._in_value(char)

    def _in_name(self, char: str) -> Outcome:
        if not self._string_ends(char):
            return Outcome.MORE
        name = self._text()
        if name is None or not FUNCTION_NAME.fullmatch(name):
            return Outcome.NO_CALL
        if self._offered is not None and name not in self._offered:
            return Outcome.NO_CALL
        self._named = True
        self._spoken.begin(name)
        self._spoken.argue("".join(self._early))
        return self._go(self._after_value)

    def _in_value(self, char: str) -> Outcome:
        place = self._value.step(char)
        if self._shown and place is not Place.BEHIND:
            self._argued = True
            if self._named:
                self._spoken.argue(char)
            else:
                self._early.append(char)
        if place is Place.BEHIND:
            self._state = self._after_value
            return self._after_value(char)
        return Outcome.MORE if place is Place.INSIDE else self._go(self._after_value)

    def _after_value(self, char: str) -> Outcome:
        if char in WHITE:
            return Outcome.MORE
        if char == ",":
            return self._go(self._before_key)
        return self._close() if char == "}" else Outcome.NO_CALL

    # -- steps between them ------------------------------------------------------------------------------------

    def _go(self, state: Callable[[str], Outcome]) -> Outcome:
        self._state = state
        return Outcome.MORE

    def _close(self) -> Outcome:
        if not self._named:
            return Outcome.NO_CALL
        if not self._argued:
            self._spoken.argue("{}")
        return Outcome.CALL

    def _begin_string(self, state: Callable[[str], Outcome]) -> Outcome:
        self._string, self._escaped = ['"'], False
        return self._go(state)

    def _string_ends(self, char: str) -> bool:
        self._string.append(char)
        ends = char == '"' and not self._escaped
        self._escaped = char == "\\" and not self._escaped
        return ends

    def _text(self) -> str | None:
        try:
            text: str = json.loads("".join(self._string))
        except ValueError:
            return None
        return text
