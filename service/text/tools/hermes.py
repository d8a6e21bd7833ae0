"""Calls as Hermes, Qwen2.5 and their like write them:

    <tool_call>
    {"name": "f", "arguments": {…}}
    </tool_call>

The tags are control tokens where the vocabulary has them as such, and then only those count; else they are text.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from service.text.chat import Tool
from service.text.tools.lark import Rules
from service.text.tools.reader import Reader
from service.text.tools.spoken import WHITE, Spoken

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def new_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class HermesTools:
    """`service.text.tools.format.ToolFormat` of models with <tool_call>.

    Args:
        controls: ids of OPEN and CLOSE, of those that are control tokens.
    """

    def __init__(self, controls: Mapping[str, int]) -> None:
        self._controls = controls
        self.first_token = controls.get(OPEN)

    def parser(self, offered: Sequence[str], *, only_one: bool) -> HermesParser:
        return HermesParser(self._controls, Spoken(new_id, only_one=only_one))

    def grammar(self, tools: Sequence[Tool], *, only_one: bool) -> str:
        rules = Rules()
        begin, end = (
            rules.literal(tag) if tag not in self._controls else rules.token(self._controls[tag])
            for tag in (OPEN, CLOSE)
        )
        call = rules.add("call", (rules.call_object(tool, "arguments") for tool in tools))
        each = rules.add("tagged", [f'{begin} "\\n" {call} "\\n" {end}'])
        return rules.text(each if only_one else f'{each} ("\\n" {each})*')


class HermesParser(Reader):
    """See `service.text.tools.format.ToolParser`."""

    def __init__(self, controls: Mapping[str, int], spoken: Spoken) -> None:
        super().__init__(spoken)
        self._markers = {token_id: name for name, token_id in controls.items()}
        self._spelled = tuple(tag for tag in (OPEN, CLOSE) if tag not in controls)
        self._tag = ""  # the beginning of a tag

    def _see(self, token_id: int) -> None:
        if (marker := self._markers.get(token_id)) is not None:
            self._mark(marker)

    def _is_plain(self, text: str) -> bool:
        return not self._tag and (not self._spelled or "<" not in text)

    def _mark(self, tag: str) -> None:
        """A tag is complete."""
        after_call = self._state == self._after
        self._tag = ""
        self._abandon()
        if tag == OPEN:
            self._held, self._state = [tag], self._opening
        elif after_call:
            self._state = self._after
        else:
            self.spoken.say(tag)

    def _abandon(self) -> None:
        """What was begun ends here, a tag's beginning with it."""
        if self._tag and self._state != self._in_object:
            self.spoken.say("".join(self._held) + self._tag)
            self._held = []
        super()._abandon()
        self._tag = ""

    # -- states: each takes the next character -----------------------------------------------------------------

    def _saying(self, char: str) -> None:
        if not self._spells(char):
            self.spoken.say(char)

    def _opening(self, char: str) -> None:
        """After <tool_call>."""
        if char == "{":
            self._begin_object(char)
            return
        self._held.append(char)
        if char not in WHITE:
            self._abandon()

    def _after(self, char: str) -> None:
        """Between calls white space is layout, unless text comes."""
        if not self._spells(char):
            self._hold(char, WHITE)

    def _spells(self, char: str) -> bool:
        """Take the character if it may be part of a tag, or shows that what stood before it is none."""
        tag = self._tag + char
        if tag in self._spelled:
            self._tag = ""
            self._mark(tag)
            return True
        if any(each.startswith(tag) for each in self._spelled):
            self._tag = tag
            return True
        if self._tag:  # "<" stands in front of tags only, so that none can begin within another
            self.spoken.say("".join(self._held) + self._tag)
            self._held, self._tag, self._state = [], "", self._saying
            self._saying(char)
            return True
        return False
