"""What the parsers of all formats share: a state takes the next character, and words are held back while it is open
whether they become a call."""

from __future__ import annotations

from collections.abc import Callable, Collection

from service.text.chat import ToolCallDelta
from service.text.tools.spoken import CallObject, Outcome, Spoken

State = Callable[[str], None]


class Reader:
    """`service.text.tools.format.ToolParser`, but for what begins a call and what may stand between calls.

    Args:
        offered: names of tools, where nothing else tells a call from other JSON.
    """

    def __init__(self, spoken: Spoken, offered: Collection[str] | None = None) -> None:
        self.spoken = spoken
        self._offered = offered
        self._state: State = self._saying
        self._held: list[str] = []  # what is text if it does not become a call
        self._object = CallObject(spoken)

    def push(self, token_id: int, text: str) -> tuple[str, list[ToolCallDelta]]:
        self._see(token_id)
        if self._state == self._saying and self._is_plain(text):
            self.spoken.say(text)
        else:
            for char in text:
                self._state(char)
        return self.spoken.take()

    def finish(self) -> tuple[str, list[ToolCallDelta]]:
        self._abandon()
        return self.spoken.take()

    # -- of a format -------------------------------------------------------------------------------------------

    def _see(self, token_id: int) -> None:
        """A token that may be a marker, before its text."""
        raise NotImplementedError

    def _is_plain(self, text: str) -> bool:
        """Between calls, nothing in it can begin one."""
        return True

    def _after(self, char: str) -> None:
        """Behind a call."""
        raise NotImplementedError

    def _behind_object(self) -> State:
        """Where a call that was one object leads to."""
        return self._after

    # -- shared ------------------------------------------------------------------------------------------------

    def _abandon(self) -> None:
        """What was begun ends here."""
        if self._state == self._in_object:
            self._object.abandon()
        elif self._state != self._after:
            self.spoken.say("".join(self._held))
        self._held, self._state = [], self._saying

    def _saying(self, char: str) -> None:
        self.spoken.say(char)

    def _begin_object(self, char: str) -> None:
        self._object = CallObject(self.spoken, "".join(self._held), self._offered)
        self._held, self._state = [], self._in_object
        self._object.step(char)

    def _in_object(self, char: str) -> None:
        match self._object.step(char):
            case Outcome.CALL:
                self._state = self._behind_object()
            case Outcome.NO_CALL:
                self._state = self._saying

    def _hold(self, char: str, layout: str) -> None:
        """Behind a call: layout, unless text comes."""
        self._held.append(char)
        if char not in layout:
            self.spoken.say("".join(self._held))
            self._held, self._state = [], self._saying
