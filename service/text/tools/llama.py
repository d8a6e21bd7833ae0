"""Calls as Llama 3.1 and 3.2 write them: the answer is a JSON object of a tool's name and its parameters,

    {"name": "f", "parameters": {…}}

or such objects with `;` between them, or the same after the control token <|python_tag|>. Nothing else marks a call, so
only objects with the name of a tool that was offered are calls; any other answer that begins with `{` is text, and is
told as soon as it cannot become a call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from service.text.chat import Tool, ToolCallDelta
from service.text.tools.hermes import new_id
from service.text.tools.lark import Rules
from service.text.tools.spoken import WHITE, CallObject, Outcome, Spoken

TAG = "<|python_tag|>"


class LlamaTools:
    """`service.text.tools.format.ToolFormat` of Llama 3.1 and 3.2.

    Args:
        controls: id of TAG, if it is a control token.
    """

    first_token: int | None = None

    def __init__(self, controls: Mapping[str, int]) -> None:
        self._tag = controls.get(TAG)

    def parser(self, offered: Sequence[str], *, only_one: bool) -> LlamaParser:
        return LlamaParser(self._tag, frozenset(offered), Spoken(new_id, only_one=only_one))

    def grammar(self, tools: Sequence[Tool], *, only_one: bool) -> str:
        """One call: Llama was not trained to make several at once."""
        rules = Rules()
        return rules.text(rules.add("call", (rules.call_object(tool, "parameters") for tool in tools)))


class LlamaParser:
    """See `service.text.tools.format.ToolParser`."""

    def __init__(self, tag: int | None, offered: frozenset[str], spoken: Spoken) -> None:
        self.spoken = spoken
        self._tag = tag
        self._offered = offered
        self._state: Callable[[str], None] = self._opening
        self._held: list[str] = []  # what is text if it does not become a call
        self._object = CallObject(spoken)

    def push(self, token_id: int, text: str) -> tuple[str, list[ToolCallDelta]]:
        if token_id == self._tag:
            self._abandon()
            self._held, self._state = [TAG], self._opening
        if self._state == self._saying:
            self.spoken.say(text)
        else:
            for char in text:
                self._state(char)
        return self.spoken.take()

    def finish(self) -> tuple[str, list[ToolCallDelta]]:
        self._abandon()
        return self.spoken.take()

    def _abandon(self) -> None:
        """What was begun ends here."""
        if self._state == self._in_object:
            self._object.abandon()
        elif self._state != self._after:
            self.spoken.say("".join(self._held))
        self._held, self._state = [], self._saying

    # -- states: each takes the next character -----------------------------------------------------------------

    def _saying(self, char: str) -> None:
        self.spoken.say(char)

    def _opening(self, char: str) -> None:
        """At the beginning, or after the tag."""
        if char == "{":
            self._object = CallObject(self.spoken, "".join(self._held), self._offered)
            self._held, self._state = [], self._in_object
            self._object.step(char)
            return
        self._held.append(char)
        if char not in WHITE:
            self._abandon()

    def _in_object(self, char: str) -> None:
        match self._object.step(char):
            case Outcome.CALL:
                self._state = self._after
            case Outcome.NO_CALL:
                self._state = self._saying

    def _after(self, char: str) -> None:
        """Between calls white space and semicolons are layout, unless text comes."""
        if char == "{":
            self._opening(char)
            return
        self._held.append(char)
        if char not in WHITE and char != ";":
            self.spoken.say("".join(self._held))
            self._held, self._state = [], self._saying
