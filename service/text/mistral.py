"""Mistral's instruction formats v1 to v3, written out at token level: ids equal those of mistral-common.

    v3  <s>[INST]u1[/INST]a1</s>[AVAILABLE_TOOLS][…][/AVAILABLE_TOOLS][INST]{system}\\n\\n{u2}[/INST]
        [TOOL_CALLS][{"name": …, "arguments": …, "id": …}]</s>[TOOL_RESULTS]{"content": …, "call_id": …}[/TOOL_RESULTS]

System text and tools stand in the last user turn. Consecutive messages of one role are one turn, joined by a blank
line. Every control token is placed by id, every text is encoded as text, so no message can forge a turn. (In v1 alone
the brackets are ordinary text, in training too, and system text stands in the first turn.)
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

from engine import CheckpointError
from service.errors import invalid
from service.text.chat import Conversation, Message, Tool, ToolCall
from service.text.check import check_conversation, dump_json, parse_json
from service.text.plain import require_utf8
from service.text.tokenizer import Tokenizer

_JOIN = "\n\n"
_CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")
_FOLLOWERS = {
    "system": ("user", "assistant", "system"),
    "user": ("assistant", "system", "user"),
    "assistant": ("assistant", "user", "tool"),
    "tool": ("assistant", "tool", "user"),
}


@dataclass(frozen=True, slots=True)
class _Turn:
    """Messages of one role that stand together. `index` is that of the first, for error messages."""

    index: int
    role: str
    content: str
    calls: tuple[ToolCall, ...] = ()
    call_id: str | None = None


class MistralChat:
    """`service.text.tokenizer.ChatTemplate` of Mistral 7B Instruct (v1, v3) and Mistral NeMo Instruct (v3, Tekken).

    Args:
        tokenizer: SentencePiece or Tekken; v3 needs its control tokens.
        version: 1 or 3.
    """

    def __init__(self, tokenizer: Tokenizer, version: int) -> None:
        if version not in (1, 3):
            raise ValueError(f"version {version} is not 1 or 3")
        self._tokenizer = tokenizer
        self._version = version
        self._bos, self._eos = self._control("<s>"), self._control("</s>")
        if version == 3:
            self._inst = self._control("[INST]"), self._control("[/INST]")
            self._tools = self._control("[AVAILABLE_TOOLS]"), self._control("[/AVAILABLE_TOOLS]")
            self._results = self._control("[TOOL_RESULTS]"), self._control("[/TOOL_RESULTS]")
            self._calls = self._control("[TOOL_CALLS]")

    def encode(self, conversation: Conversation) -> list[int]:
        check_conversation(conversation)
        _check_order(conversation)
        if self._version == 1 and (conversation.tools or any(m.role == "tool" for m in conversation.messages)):
            raise invalid("tools", "this model was not trained to use tools")
        system = _JOIN.join(m.content for m in conversation.messages if m.role == "system" and m.content)
        turns = _turns(conversation.messages)
        users = [position for position, turn in enumerate(turns) if turn.role == "user"]
        system_position = users[0] if self._version == 1 else users[-1]
        ids = [self._bos]
        for position, turn in enumerate(turns):
            if turn.role == "user":
                if position == users[-1] and conversation.tools:
                    ids += self._available_tools(conversation.tools)
                prefix = system + _JOIN if system and position == system_position else ""
                ids += self._user(prefix + turn.content)
            elif turn.role == "assistant":
                ids += self._assistant(turn)
                ids.append(self._eos)
            else:
                ids += self._tool_result(turn)
        return ids[:-1] if conversation.continue_final_message else ids

    def _user(self, content: str) -> list[int]:
        if self._version == 1:
            return self._tokenizer.encode(f"[INST] {content} [/INST]")
        return [self._inst[0], *self._tokenizer.encode(content), self._inst[1]]

    def _assistant(self, turn: _Turn) -> list[int]:
        if turn.calls and turn.content:
            raise invalid(f"messages[{turn.index}]", "an assistant turn must have either content or tool_calls")
        if not turn.calls:
            return self._tokenizer.encode(turn.content if self._version == 1 else turn.content.rstrip(" "))
        calls = [
            {"name": call.name, "arguments": parse_json(call.arguments or "{}"), "id": call.id} for call in turn.calls
        ]
        return [self._calls, *self._json(calls, f"messages[{turn.index}].tool_calls")]

    def _available_tools(self, tools: tuple[Tool, ...]) -> list[int]:
        functions = [
            {"name": tool.name, "description": tool.description, "parameters": parse_json(tool.parameters or "{}")}
            for tool in tools
        ]
        listed = [{"type": "function", "function": function} for function in functions]
        return [self._tools[0], *self._json(listed, "tools"), self._tools[1]]

    def _tool_result(self, turn: _Turn) -> list[int]:
        result = {"content": parse_json(turn.content or "{}"), "call_id": turn.call_id}
        return [self._results[0], *self._json(result, f"messages[{turn.index}].content"), self._results[1]]

    def _json(self, value: Any, field: str) -> list[int]:
        return self._tokenizer.encode(dump_json(value, field))

    def _control(self, name: str) -> int:
        token_id = self._tokenizer.control_id(name)
        if token_id is None:
            raise CheckpointError(f"tokenizer: the Mistral chat format needs the control token {name}")
        return token_id


def _turns(messages: tuple[Message, ...]) -> list[_Turn]:
    """Messages joined to turns, without the system's; a conversation begins with a user turn, if need be an empty one.

    A system message between two others of one role keeps these apart. Tool results are never joined.
    """
    turns: list[_Turn] = []
    for role, group in itertools.groupby(enumerate(messages), key=lambda pair: pair[1].role):
        same = list(group)
        if role == "tool":
            turns += [_Turn(i, role, m.content, call_id=m.tool_call_id) for i, m in same]
        elif role != "system":
            content = _JOIN.join(m.content for _, m in same if m.content)
            turns.append(_Turn(same[0][0], role, content, tuple(call for _, m in same for call in m.tool_calls)))
    if not turns or turns[0].role != "user":
        turns.insert(0, _Turn(0, "user", ""))
    return turns


def _check_order(conversation: Conversation) -> None:
    """The order and the form of messages that the model was trained on (mistral-common, validator.py, serving mode)."""
    messages = conversation.messages
    open_calls = 0
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        allowed = _FOLLOWERS[messages[index - 1].role] if index else ("system", "user", "assistant")
        if message.role not in allowed:
            before = f"after {messages[index - 1].role}" if index else "first"
            raise invalid(f"{field}.role", f"{message.role!r} cannot stand {before}; allowed: {', '.join(allowed)}")
        if message.role == "assistant":
            if bool(message.content) == bool(message.tool_calls):
                raise invalid(field, "an assistant message must have either content or tool_calls")
            _check_calls_answered(field, open_calls)
            open_calls = len(message.tool_calls)
            for number, call in enumerate(message.tool_calls):
                _check_call_id(f"{field}.tool_calls[{number}].id", call.id)
        if message.role == "tool":
            open_calls -= 1
            _check_call_id(f"{field}.tool_call_id", message.tool_call_id or "")
    last = f"messages[{len(messages) - 1}]"
    _check_calls_answered(last, open_calls)
    if messages[-1].role == "assistant" and not conversation.continue_final_message:
        raise invalid(f"{last}.role", "the last message must be from user or tool, or be continued")


def _check_calls_answered(field: str, open_calls: int) -> None:
    if open_calls:
        what = f"{open_calls} tool calls have no answer" if open_calls > 0 else f"{-open_calls} answers have no call"
        raise invalid(field, f"every tool call needs one answer before the next turn: {what}")


def _check_call_id(field: str, call_id: str) -> None:
    require_utf8(call_id, field)
    if not _CALL_ID.fullmatch(call_id):
        raise invalid(field, f"{call_id[:40]!r} must be 9 letters and digits")
