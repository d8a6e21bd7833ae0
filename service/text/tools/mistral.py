"""Calls as Mistral's models write them, after a control token that no text can spell.

    v3, v7   [TOOL_CALLS][{"name": "f", "arguments": {…}}, …]
    v11      [TOOL_CALLS]f[CALL_ID]4Zb8kVcQ1[ARGS]{…}, once per call
    v13      [TOOL_CALLS]f[ARGS]{…}; some models write [TOOL_CALLS]f{…}

The parser goes by what comes after [TOOL_CALLS], so that one reads them all. An id is taken from [CALL_ID]; one that
stands behind the arguments of v3 comes too late for a stream, so those calls get ids of ours. Ids have nine letters and
digits, as the formats demand of those that come back.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Mapping, Sequence

from service.text.chat import Tool
from service.text.check import FUNCTION_NAME
from service.text.tools.lark import Rules
from service.text.tools.reader import Reader, State
from service.text.tools.spoken import WHITE, JsonValue, Place, Spoken

CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_ID = re.compile(r"[a-zA-Z0-9]{9}")
_LONGEST_HEAD = 256  # characters of a name, or of an id, and white space around it


def new_id() -> str:
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class MistralTools:
    """`service.text.tools.format.ToolFormat` of models with [TOOL_CALLS].

    Args:
        controls: ids of the control tokens by name, those that the vocabulary has of CALLS, CALL_ID and ARGS.
        listed: calls are a JSON list (v3, v7), not one after the other (v11 on).
        with_ids: each call tells its id (v11).
    """

    def __init__(self, controls: Mapping[str, int], *, listed: bool, with_ids: bool) -> None:
        self._markers = {token_id: name for name, token_id in controls.items()}
        self._controls = controls
        self._listed = listed
        self._with_ids = with_ids
        self.first_token: int | None = controls[CALLS]

    def parser(self, offered: Sequence[str], *, only_one: bool) -> MistralParser:
        return MistralParser(self._markers, Spoken(new_id, only_one=only_one))

    def grammar(self, tools: Sequence[Tool], *, only_one: bool) -> str:
        rules = Rules()
        calls = rules.token(self._controls[CALLS])
        if self._listed:
            call = rules.add("call", (rules.call_object(tool, "arguments") for tool in tools))
            rest = "" if only_one else f' (", " {call})*'
            return rules.text(f'{calls} " "? "[" {call}{rest} "]"')  # SentencePiece begins words with a space
        name_ends = rules.token(self._controls[ARGS])
        if self._with_ids:
            name_ends = f"{rules.token(self._controls[CALL_ID])} /[a-zA-Z0-9]{{9}}/ {name_ends}"
        call = rules.add(
            "call", (f"{calls} {rules.literal(tool.name)} {name_ends} {rules.arguments(tool)}" for tool in tools)
        )
        return rules.text(call if only_one else f"{call}+")


class MistralParser(Reader):
    """See `service.text.tools.format.ToolParser`."""

    def __init__(self, markers: Mapping[int, str], spoken: Spoken) -> None:
        super().__init__(spoken)
        self._markers = markers
        self._head: list[str] = []  # of the name, or the id
        self._name = ""
        self._in_list = False
        self._value = JsonValue()

    def _see(self, token_id: int) -> None:
        if (marker := self._markers.get(token_id)) is not None:
            self._mark(marker)

    def _behind_object(self) -> State:
        return self._between if self._in_list else self._after

    def _mark(self, marker: str) -> None:
        if marker == CALLS:
            self._abandon()
            self._held, self._state = [marker], self._opening
        elif marker == CALL_ID and self._state == self._in_name and self._take_name():
            self._held.append(marker)
            self._state = self._in_id
        elif marker == ARGS and self._state == self._in_name and self._take_name():
            self._begin("")
        elif marker == ARGS and self._state == self._in_id:
            given = "".join(self._head).strip()
            self._begin(given if _ID.fullmatch(given) else "")
        else:
            self._no_call(marker)

    def _no_call(self, text: str) -> None:
        self._abandon()
        self.spoken.say(text)

    # -- states: each takes the next character -----------------------------------------------------------------

    def _opening(self, char: str) -> None:
        """After [TOOL_CALLS]: a list, an object, or a name."""
        if char == "[":
            self._held.append(char)
            self._in_list, self._state = True, self._between
        elif char == "{":
            self._in_list = False
            self._begin_object(char)
        elif char in WHITE:
            self._held.append(char)
        else:
            self._head, self._state = [], self._in_name
            self._in_name(char)

    def _between(self, char: str) -> None:
        """In a list, outside of its objects."""
        if char == "{":
            self._begin_object(char)
        elif char == "]" and not self._held:
            self._state = self._after
        elif char in WHITE or char == ",":
            if self._held:  # after the first call these are layout
                self._held.append(char)
        else:
            self._no_call(char)

    def _in_name(self, char: str) -> None:
        if char == "{" and self._take_name():
            self._begin("")
            self._in_arguments(char)
        elif (FUNCTION_NAME.fullmatch(char) or char in WHITE) and len(self._head) < _LONGEST_HEAD:
            self._held.append(char)
            self._head.append(char)
        else:
            self._no_call(char)

    def _in_id(self, char: str) -> None:
        if len(self._head) < _LONGEST_HEAD:
            self._held.append(char)
            self._head.append(char)
        else:
            self._no_call(char)

    def _before_arguments(self, char: str) -> None:
        if char not in WHITE:
            self._in_arguments(char)

    def _in_arguments(self, char: str) -> None:
        self._state = self._in_arguments
        place = self._value.step(char)
        if place is Place.BEHIND:
            self._end_call()
            self._after(char)
            return
        self.spoken.argue(char)
        if place is Place.LAST:
            self._end_call()

    def _after(self, char: str) -> None:
        """Between calls white space is layout, unless text comes."""
        self._hold(char, WHITE)

    # -- steps between them ------------------------------------------------------------------------------------

    def _take_name(self) -> bool:
        self._name, self._head = "".join(self._head).strip(), []
        return FUNCTION_NAME.fullmatch(self._name) is not None

    def _begin(self, call_id: str) -> None:
        self.spoken.begin(self._name, call_id)
        self._held, self._value, self._state = [], JsonValue(), self._before_arguments

    def _end_call(self) -> None:
        self.spoken.end()
        self._held, self._state = [], self._after
