"""Calls as Llama 3.1 and 3.2 write them: the answer is a JSON object of a tool's name and its parameters,

    {"name": "f", "parameters": {…}}

or such objects with `;` between them, or the same after the control token <|python_tag|>. Nothing else marks a call, so
only objects with the name of a tool that was offered are calls; any other answer that begins with `{` is text, and is
told as soon as it cannot become a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from service.text.chat import Tool
from service.text.tools.hermes import new_id
from service.text.tools.lark import Rules
from service.text.tools.reader import Reader
from service.text.tools.spoken import WHITE, Spoken

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


class LlamaParser(Reader):
    """See `service.text.tools.format.ToolParser`."""

    def __init__(self, tag: int | None, offered: frozenset[str], spoken: Spoken) -> None:
        super().__init__(spoken, offered)
        self._tag = tag
        self._state = self._opening

    def _see(self, token_id: int) -> None:
        if token_id == self._tag:
            self._abandon()
            self._held, self._state = [TAG], self._opening

    # -- states: each takes the next character -----------------------------------------------------------------

    def _opening(self, char: str) -> None:
        """At the beginning, or after the tag."""
        if char == "{":
            self._begin_object(char)
            return
        self._held.append(char)
        if char not in WHITE:
            self._abandon()

    def _after(self, char: str) -> None:
        """Between calls white space and semicolons are layout, unless text comes."""
        if char == "{":
            self._begin_object(char)
        else:
            self._hold(char, WHITE + ";")
