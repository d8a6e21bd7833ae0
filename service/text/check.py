"""What every conversation must fulfil whatever the model; templates add their own demands."""

from __future__ import annotations

import json
import re
from typing import Any

from service.errors import invalid
from service.text.chat import Conversation, Message, Tool
from service.text.plain import require_utf8

ROLES = ("system", "user", "assistant", "tool")
_FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


def check_conversation(conversation: Conversation) -> None:
    """Refuse conversations that no template could render.

    Raises:
        ServiceError: INVALID_ARGUMENT naming `messages[i].…` or `tools[i].…`.
    """
    if not conversation.messages:
        raise invalid("messages", "is empty, must have at least one message")
    for index, message in enumerate(conversation.messages):
        _check_message(f"messages[{index}]", message)
    for index, tool in enumerate(conversation.tools):
        _check_tool(f"tools[{index}]", tool)
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


def _check_tool(field: str, tool: Tool) -> None:
    _check_name(f"{field}.name", tool.name)
    require_utf8(tool.description, f"{field}.description")
    require_utf8(tool.parameters, f"{field}.parameters")
    if not isinstance(parse_json(tool.parameters or "{}"), dict):
        raise invalid(f"{field}.parameters", "is not a JSON object")


def _check_name(field: str, name: str) -> None:
    if not _FUNCTION_NAME.fullmatch(name):
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
