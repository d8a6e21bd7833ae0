"""Conversations as plain data, whatever protocol brought them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that an assistant message made. `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallDelta:
    """More of tool call number `call` of a completion. Its first piece brings `id` and `name`; the pieces of
    `arguments` join to JSON text."""

    call: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn. `role` is system, user, assistant or tool; `tool_call_id` belongs to tool messages."""

    role: str
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may call. `parameters` is a JSON schema as text."""

    name: str
    description: str = ""
    parameters: str = "{}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What a chat request asks the model to continue.

    Attributes:
        tool_choice: whether the answer may (auto), must not (none) or must (required) call tools.
        tool_name: the one tool that it must call, if required.
        parallel_tool_calls: it may call several.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: Literal["auto", "none", "required"] = "auto"
    tool_name: str | None = None
    parallel_tool_calls: bool = True
    continue_final_message: bool = False
