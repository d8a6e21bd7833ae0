"""What `tools` and `tool_choice` of a conversation mean for one answer of a model that speaks some format.

none       the template does not show the tools, and no call can begin
auto       the model decides; with no format that we know, what it writes stays text
required   a grammar allows calls alone, with arguments that fit the tool's schema; so for one named tool, one call
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine import Grammar
from service.errors import ServiceError, invalid
from service.text.chat import Conversation
from service.text.tools.format import ToolFormat, ToolParser


@dataclass(frozen=True, slots=True)
class ToolUse:
    """
    Attributes:
        grammar: what the answer must be, None for anything.
        barred: a token that the answer must not have.
    """

    format: ToolFormat | None = None
    offered: Sequence[str] = ()
    only_one: bool = False
    grammar: Grammar | None = None
    barred: int | None = None

    def parser(self) -> ToolParser | None:
        """A parser for one completion; None if whatever the model writes is text."""
        return None if self.format is None else self.format.parser(self.offered, only_one=self.only_one)

    def blamed(self, error: ServiceError) -> ServiceError:
        """What is wrong with the grammar is wrong with the tools: the client knows of no other."""
        if self.grammar is None or error.field != "response_format":
            return error
        return error.about("tools", error.message.replace("lark", "grammar of their schemas", 1))


def without_barred_tools(conversation: Conversation) -> Conversation:
    """The conversation as the model is to see it."""
    return replace(conversation, tools=()) if conversation.tool_choice == "none" else conversation


def tool_use(conversation: Conversation, format: ToolFormat | None, answer: Grammar | None = None) -> ToolUse:
    """
    Args:
        conversation: one that `check_conversation` has passed.
        answer: what the client demands the text of the answer to be. It governs the whole answer, so none calls tools.

    Raises:
        ServiceError: INVALID_ARGUMENT, calls are required of a model of which we do not know how it makes them, or
            beside an answer of another form.
    """
    if not conversation.tools:
        return ToolUse()
    if conversation.tool_choice == "none":
        return ToolUse(barred=None if format is None else format.first_token)
    if conversation.tool_choice == "auto":
        if answer is not None:
            return ToolUse()
        offered = tuple(tool.name for tool in conversation.tools)
        return ToolUse(format, offered, only_one=not conversation.parallel_tool_calls)
    if format is None:
        raise invalid("tool_choice", "this model writes calls in no format that is known here, so none can be required")
    if answer is not None:
        raise invalid("response_format", "cannot be demanded of an answer that must call a tool (tool_choice)")
    tools = [tool for tool in conversation.tools if conversation.tool_name in (None, tool.name)]
    only_one = conversation.tool_name is not None or not conversation.parallel_tool_calls
    grammar = Grammar(kind="lark", text=format.grammar(tools, only_one=only_one))
    return ToolUse(format, tuple(tool.name for tool in tools), only_one=only_one, grammar=grammar)
