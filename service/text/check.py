"""What every conversation must fulfil whatever the model; templates add their own demands."""

from __future__ import annotations

import json
import re
from typing import Any

from service.errors import invalid
from service.text.chat import Conversation, Message, Tool
from service.text.plain import require_utf8

MAX_TOOLS = 128  # as the OpenAI API
MAX_SCHEMA = 256 * 1024  # characters; what a tool's schema costs to parse, render and compile grows with it
MAX_MESSAGES = 2**14  # of a conversation, and as many calls: each takes some of the 2**17 tokens of a long context
ROLES = ("system", "user", "assistant", "tool")
FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


def check_counts(*, messages: int, calls: int, tools: int) -> None:
    """Of what a client has sent, before anything is made of it: a message without text has two bytes on the wire, so
    that a request may have millions of them.

    Raises:
        ServiceError: INVALID_ARGUMENT.
    """
    for field, count, most in (
        ("messages", messages, MAX_MESSAGES),
        ("tool_calls", calls, MAX_MESSAGES),
        ("tools", tools, MAX_TOOLS),
    ):
        if count > most:
            raise invalid(field, f"has {count} {field.replace('_', ' ')}, must have at most {most}")


def check_conversation(conversation: Conversation) -> None:
    """Refuse conversations that no template could render.

    Raises:
        ServiceError: INVALID_ARGUMENT naming `messages[i].…`, `tools[i].…` or `tool_choice`.
    """
    if not conversation.messages:
        raise invalid("messages", "is empty, must have at least one message")
    check_counts(
        messages=len(conversation.messages),
        calls=sum(len(message.tool_calls) for message in conversation.messages),
        tools=len(conversation.tools),
    )
    for index, message in enumerate(conversation.messages):
        _check_message(f"messages[{index}]", message)
    _check_tools(conversation)
    last = conversation.messages[-1]
    if conversation.continue_final_message and (last.role != "assistant" or not last.content or last.tool_calls):
        reason = "the last message must be text of the assistant"
        raise invalid("continue_final_message", f"{reason}, messages[{len(conversation.messages) - 1}] is not")


def _check_message(field: str, message: Message) -> None:
    if message.role not in ROLES:
        raise invalid(f"{field}.role", f"{message.role!r} is not one of {', '.join(ROLES)}")
    require_utf8(message.content, f"{field}.content")
    if message.tool_calls and message.role != "assistant":
        raise invalid(f"{field}.tool_calls", f"only assistant messages call tools, this one is from {message.role}")
    if message.tool_call_id is not None:
        if message.role != "tool":
            raise invalid(f"{field}.tool_call_id", f"only tool messages answer a call, this one is from {message.role}")
        require_utf8(message.tool_call_id, f"{field}.tool_call_id")
    for index, call in enumerate(message.tool_calls):
        require_utf8(call.id, f"{field}.tool_calls[{index}].id")
        require_utf8(call.arguments, f"{field}.tool_calls[{index}].arguments")
        _check_name(f"{field}.tool_calls[{index}].name", call.name)


def check_answers(messages: tuple[Message, ...]) -> None:
    """Tool messages answer calls that were made before.

    Raises:
        ServiceError: INVALID_ARGUMENT naming `messages[i].…`.
    """
    calls: set[str] = set()
    for index, message in enumerate(messages):
        calls.update(call.id for call in message.tool_calls)
        if message.role != "tool":
            continue
        if not calls:
            raise invalid(f"messages[{index}].role", "a tool answers a call, and no message before this one made any")
        if message.tool_call_id is not None and message.tool_call_id not in calls:
            shown = f"{message.tool_call_id[:40]!r}"
            raise invalid(f"messages[{index}].tool_call_id", f"{shown} is no call that a message before this one made")


def _check_tools(conversation: Conversation) -> None:
    tools, name = conversation.tools, conversation.tool_name
    seen: dict[str, int] = {}
    for index, tool in enumerate(tools):
        _check_tool(f"tools[{index}]", tool)
        if (first := seen.setdefault(tool.name, index)) != index:
            raise invalid(f"tools[{index}].name", f"{tool.name!r} is the name of tools[{first}] already")
    if conversation.tool_choice == "required" and not tools:
        raise invalid("tool_choice", "a call is required, but there are no tools")
    if name is not None and name not in seen:
        raise invalid("tool_name", f"{name[:80]!r} is not among the tools")


def _check_tool(field: str, tool: Tool) -> None:
    _check_name(f"{field}.name", tool.name)
    require_utf8(tool.description, f"{field}.description")
    require_utf8(tool.parameters, f"{field}.parameters")
    if (size := len(tool.parameters)) > MAX_SCHEMA:
        raise invalid(f"{field}.parameters", f"has {size} characters, must have at most {MAX_SCHEMA}")
    schema = parse_json(tool.parameters or "{}")
    if not isinstance(schema, dict):
        raise invalid(f"{field}.parameters", "is not a JSON object")
    if (kind := schema.get("type", "object")) != "object":
        raise invalid(f"{field}.parameters", f"is the schema of {str(kind)[:40]!r}, arguments are an object")


def _check_name(field: str, name: str) -> None:
    if not FUNCTION_NAME.fullmatch(name):
        raise invalid(field, f"{name[:80]!r} is not a function name: 1 to 64 letters, digits, '_', '-' and '.'")


def parse_json(text: str) -> Any:
    """The JSON value that `text` spells, or `text` itself if it spells none that Python can hold."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def dump_json(value: Any, field: str) -> str:
    """JSON as templates write it: `", "` and `": "`, characters unescaped.

    Raises:
        ServiceError: INVALID_ARGUMENT naming `field`: nested too deeply, or an escape smuggled in a lone surrogate.
    """
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise invalid(field, "is nested too deeply") from None
    require_utf8(text, field)
    return text
