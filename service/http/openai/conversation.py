"""Messages and tools of a chat request, and what they are in `service.text.chat`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import msgspec

from service.errors import ServiceError, invalid
from service.http.openai.parameters import raw_text
from service.text.chat import Conversation, Message, Tool, ToolCall
from service.text.check import check_counts

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


# What belongs to a tool or a call stands one level deeper in a body than in a conversation.
_IN_FUNCTION = re.compile(r"((?:tools|tool_calls)\[\d+\])\.(name|description|parameters|arguments)$")


class Part(msgspec.Struct, kw_only=True):
    """A part of a message's content: text. Other types are refused."""

    type: str
    text: str | None = None


class CalledFunction(msgspec.Struct, kw_only=True):
    """`arguments` is JSON text."""

    name: str
    arguments: str = "{}"


class Call(msgspec.Struct, kw_only=True):
    function: CalledFunction
    id: str = ""
    type: str = "function"


class ChatMessage(msgspec.Struct, kw_only=True):
    """One turn. `name` has no effect: chat templates do not know it."""

    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None


class Function(msgspec.Struct, kw_only=True):
    """`parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    strict: bool | None = None


class ChatTool(msgspec.Struct, kw_only=True):
    type: str
    function: Function | None = None


class NamedFunction(msgspec.Struct, kw_only=True):
    name: str


class NamedTool(msgspec.Struct, kw_only=True):
    type: str
    function: NamedFunction | None = None


def conversation_of(
    messages: list[ChatMessage],
    tools: list[ChatTool],
    choice: str | NamedTool | None,
    *,
    parallel: bool = True,
    continue_final: bool = False,
) -> Conversation:
    """The conversation that is to be answered.

    Raises:
        ServiceError: INVALID_ARGUMENT naming the message, part or tool at fault.
    """
    calls = sum(len(message.tool_calls or ()) for message in messages)
    check_counts(messages=len(messages), calls=calls, tools=len(tools))
    given = tuple(_tool(index, tool) for index, tool in enumerate(tools))
    kind, name = _choice(choice, {tool.name for tool in given})
    return Conversation(
        messages=tuple(_message(f"messages[{index}]", message) for index, message in enumerate(messages)),
        tools=given,
        tool_choice=kind,
        tool_name=name,
        parallel_tool_calls=parallel,
        continue_final_message=continue_final,
    )


def as_written(error: ServiceError, names: Mapping[str, str]) -> ServiceError:
    """The error about its field as the client wrote it.

    Args:
        names: what it wrote for fields that have other names in the service. What tools have is in `function` for it.
    """
    field = error.field or ""
    return error.about(names.get(field) or _IN_FUNCTION.sub(r"\1.function.\2", field))


def _message(path: str, message: ChatMessage) -> Message:
    if message.role not in ROLES:
        raise invalid(f"{path}.role", f"{message.role[:64]!r} must be one of {', '.join(ROLES)}")
    if message.content is None and not message.tool_calls:
        raise invalid(f"{path}.content", "is missing")
    if message.role == "tool" and message.tool_call_id is None:
        raise invalid(f"{path}.tool_call_id", "is missing: the call that this message answers")
    calls = message.tool_calls or []
    if calls and message.role != "assistant":
        raise invalid(f"{path}.tool_calls", f"does not go with the role {message.role}")
    for index, call in enumerate(calls):
        _check_function(f"{path}.tool_calls[{index}].type", call.type)
    return Message(
        role=ROLES[message.role],
        content=_text(f"{path}.content", message.content),
        tool_calls=tuple(
            ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments) for call in calls
        ),
        tool_call_id=message.tool_call_id,
    )


def _text(path: str, content: str | list[Part] | None) -> str:
    """Parts become paragraphs, as in vLLM."""
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content or ()):
        if part.type != "text":
            raise invalid(f"{path}[{index}].type", f"{part.type[:64]!r} is not served: the model reads text alone")
        if part.text is None:
            raise invalid(f"{path}[{index}].text", "is missing")
        texts.append(part.text)
    return "\n".join(texts)


def _tool(index: int, tool: ChatTool) -> Tool:
    path = f"tools[{index}]"
    _check_function(f"{path}.type", tool.type)
    if tool.function is None:
        raise invalid(f"{path}.function", "is missing")
    return Tool(
        name=tool.function.name,
        description=tool.function.description or "",
        parameters=raw_text(tool.function.parameters) or "{}",
    )


def _choice(choice: str | NamedTool | None, names: set[str]) -> tuple[Literal["auto", "none", "required"], str | None]:
    if choice is None or choice == "auto":
        return "auto", None
    if choice == "none":
        return "none", None
    if not names:
        raise invalid("tool_choice", "does not go without tools")
    if choice == "required":
        return "required", None
    if isinstance(choice, str):
        raise invalid("tool_choice", f"{choice[:64]!r} must be none, auto, required or a function")
    _check_function("tool_choice.type", choice.type)
    name = choice.function.name if choice.function is not None else ""
    if name not in names:
        raise invalid("tool_choice.function.name", f"{name[:64]!r} is none of the tools")
    return "required", name


def _check_function(field: str, kind: str) -> None:
    if kind != "function":
        raise invalid(field, f"{kind[:64]!r} is not served; the one type is function")
