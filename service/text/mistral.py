"""Mistral's instruction formats, written out at token level: ids equal those of mistral-common.

    v1   <s>[INST] {system}\\n\\n{u1} [/INST]a1</s>…, the brackets as ordinary text             Mistral 7B v0.1
    v3   <s>[INST]u1[/INST]a1</s>[AVAILABLE_TOOLS][…][/AVAILABLE_TOOLS][INST]{system}\\n\\n{u2}[/INST]
         [TOOL_CALLS][{"name": …, "arguments": …, "id": …}]</s>
         [TOOL_RESULTS]{"content": …, "call_id": …}[/TOOL_RESULTS]                     Mistral 7B v0.3, NeMo
    v7   <s>[SYSTEM_PROMPT]…[/SYSTEM_PROMPT][INST]u1[/INST]…, calls as in v3
         [TOOL_RESULTS]{id}[TOOL_CONTENT]…[/TOOL_RESULTS]                              Mistral Small 3, 3.1
    v11  [TOOL_CALLS]{name}[CALL_ID]{id}[ARGS]{…}, once per call; results as in v7     Mistral Small 3.2
    v13  [TOOL_CALLS]{name}[ARGS]{…}; [TOOL_RESULTS]…[/TOOL_RESULTS]; tools stand in front of the first user turn

Up to v11 the tools stand in front of the last user turn; up to v3 the system text stands within a user turn, the last
one (in v1 the first), later where it was said. Consecutive messages of one role are one turn, joined by a blank line.
Every control token is placed by id, every text is encoded as text, so no message can forge a turn.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from typing import Any

from engine import CheckpointError
from service.errors import invalid
from service.text.chat import Conversation, Message, Tool, ToolCall
from service.text.check import check_conversation, dump_json, parse_json
from service.text.plain import require_utf8
from service.text.tokenizer import Tokenizer

VERSIONS = (1, 3, 7, 11, 13)
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
    call_id: str = ""


class MistralChat:
    """`service.text.tokenizer.ChatTemplate` of Mistral's instruction models.

    Args:
        tokenizer: SentencePiece or Tekken; from v3 on it needs the format's control tokens.
        version: one of VERSIONS; also an attribute.

    Raises:
        CheckpointError: the tokenizer lacks a control token.
    """

    def __init__(self, tokenizer: Tokenizer, version: int) -> None:
        if version not in VERSIONS:
            raise ValueError(f"version {version} is not one of {VERSIONS}")
        self._tokenizer = tokenizer
        self.version = version
        self._id = {name: self._control(name) for name in _controls(version)}

    def encode(self, conversation: Conversation) -> list[int]:
        check_conversation(conversation)
        _check_order(conversation, self.version)
        turns = _turns(conversation.messages)
        if self.version < 7:
            turns = _merged_system(turns, first=self.version == 1)
        if self.version >= 11:
            turns = _results_in_order_of_calls(turns)
        users = [position for position, turn in enumerate(turns) if turn.role == "user"]
        tools_position = (users or [-1])[0 if self.version >= 13 else -1]
        ids = [self._id["<s>"]]
        for position, turn in enumerate(turns):
            if position == tools_position and conversation.tools:
                ids += self._available_tools(conversation.tools)
            ids += self._turn(turn)
        return ids[:-1] if conversation.continue_final_message else ids

    def _turn(self, turn: _Turn) -> list[int]:
        if turn.role == "user" and self.version == 1:
            return self._text(f"[INST] {turn.content} [/INST]")
        if turn.role == "user":
            return self._between("[INST]", turn.content)
        if turn.role == "system":
            return self._between("[SYSTEM_PROMPT]", turn.content)
        if turn.role == "tool":
            return self._tool_result(turn)
        return [*self._assistant(turn), self._id["</s>"]]

    def _assistant(self, turn: _Turn) -> list[int]:
        if turn.calls and turn.content and self.version < 7:
            raise invalid(f"messages[{turn.index}]", "an assistant turn must have either content or tool_calls")
        content = turn.content if self.version == 1 else turn.content.rstrip(" ")
        ids = self._text(content) if content else []
        if not turn.calls:
            return ids
        field = f"messages[{turn.index}].tool_calls"
        arguments = [parse_json(call.arguments or "{}") for call in turn.calls]
        if self.version < 11:
            calls = [
                {"name": call.name, "arguments": value, "id": call.id}
                for call, value in zip(turn.calls, arguments, strict=True)
            ]
            return [*ids, self._id["[TOOL_CALLS]"], *self._json(calls, field)]
        for call, value in zip(turn.calls, arguments, strict=True):
            ids += [self._id["[TOOL_CALLS]"], *self._text(call.name)]
            if self.version < 13:
                ids += [self._id["[CALL_ID]"], *self._text(call.id)]
            ids += [self._id["[ARGS]"], *self._json(value, field)]
        return ids

    def _available_tools(self, tools: tuple[Tool, ...]) -> list[int]:
        functions = [
            {"name": tool.name, "description": tool.description, "parameters": parse_json(tool.parameters or "{}")}
            for tool in tools
        ]
        listed = [{"type": "function", "function": function} for function in functions]
        return self._between("[AVAILABLE_TOOLS]", dump_json(listed, "tools"))

    def _tool_result(self, turn: _Turn) -> list[int]:
        if self.version < 7:
            result = {"content": parse_json(turn.content or "{}"), "call_id": turn.call_id}
            return self._between("[TOOL_RESULTS]", dump_json(result, f"messages[{turn.index}].content"))
        if self.version < 13:
            content = [*self._text(turn.call_id), self._id["[TOOL_CONTENT]"], *self._text(turn.content)]
            return [self._id["[TOOL_RESULTS]"], *content, self._id["[/TOOL_RESULTS]"]]
        return self._between("[TOOL_RESULTS]", turn.content)

    def _between(self, opening: str, text: str) -> list[int]:
        return [self._id[opening], *self._text(text), self._id["[/" + opening[1:]]]

    def _json(self, value: Any, field: str) -> list[int]:
        return self._text(dump_json(value, field))

    def _text(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def _control(self, name: str) -> int:
        token_id = self._tokenizer.control_id(name)
        if token_id is None:
            raise CheckpointError(f"tokenizer: the Mistral chat format v{self.version} needs the token {name}")
        return token_id


def _controls(version: int) -> list[str]:
    """Control tokens that a format places."""
    names = ["<s>", "</s>"]
    if version >= 3:
        names += ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]"]
        names += ["[TOOL_RESULTS]", "[/TOOL_RESULTS]"]
    if version >= 7:
        names += ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    if version in (7, 11):
        names.append("[TOOL_CONTENT]")
    if version >= 11:
        names.append("[ARGS]")
    if version == 11:
        names.append("[CALL_ID]")
    return names


def _turns(messages: tuple[Message, ...]) -> list[_Turn]:
    """Messages joined to turns. System messages and tool results are never joined."""
    turns: list[_Turn] = []
    for role, group in itertools.groupby(enumerate(messages), key=lambda pair: pair[1].role):
        same = list(group)
        if role in ("system", "tool"):
            turns += [_Turn(i, role, m.content, call_id=m.tool_call_id or "") for i, m in same]
        else:
            content = _JOIN.join(m.content for _, m in same if m.content)
            turns.append(_Turn(same[0][0], role, content, tuple(call for _, m in same for call in m.tool_calls)))
    return turns


def _merged_system(turns: list[_Turn], *, first: bool) -> list[_Turn]:
    """Turns with all system text in front of the first or the last user turn; the first turn is a user's, if need be an
    empty one."""
    system = _JOIN.join(turn.content for turn in turns if turn.role == "system" and turn.content)
    turns = [turn for turn in turns if turn.role != "system"]
    if not turns or turns[0].role != "user":
        turns.insert(0, _Turn(0, "user", ""))
    if system:
        users = [position for position, turn in enumerate(turns) if turn.role == "user"]
        place = users[0 if first else -1]
        turns[place] = replace(turns[place], content=system + _JOIN + turns[place].content)
    return turns


def _results_in_order_of_calls(turns: list[_Turn]) -> list[_Turn]:
    """Turns with the results after an assistant's turn in the order in which it made the calls."""
    ordered: list[_Turn] = []
    order: dict[str, int] = {}
    for role, group in itertools.groupby(turns, key=lambda turn: turn.role):
        same = list(group)
        if role == "assistant":
            order = {call.id: number for number, call in enumerate(same[-1].calls)}
        ordered += sorted(same, key=lambda turn: order[turn.call_id]) if role == "tool" else same
    return ordered


def _check_order(conversation: Conversation, version: int) -> None:
    """The order and the form of messages that the model was trained on (mistral-common, validator.py, serving mode)."""
    messages = conversation.messages
    if version == 1 and (conversation.tools or any(message.role == "tool" for message in messages)):
        raise invalid("tools", "this model was not trained to use tools")
    open_calls: list[str] = []
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        allowed = _FOLLOWERS[messages[index - 1].role] if index else ("system", "user", "assistant")
        if message.role not in allowed:
            before = f"after {messages[index - 1].role}" if index else "first"
            raise invalid(f"{field}.role", f"{message.role!r} cannot stand {before}; allowed: {', '.join(allowed)}")
        if message.role == "assistant":
            _check_answered(field, open_calls)
            _check_assistant(field, message, version)
            open_calls = [call.id for call in message.tool_calls]
        if message.role == "tool":
            _check_call_id(f"{field}.tool_call_id", message.tool_call_id or "", version)
            _take_call(field, open_calls, message.tool_call_id or "", version)
    last = f"messages[{len(messages) - 1}]"
    _check_answered(last, open_calls)
    if messages[-1].role == "assistant" and not conversation.continue_final_message:
        raise invalid(f"{last}.role", "the last message must be from user or tool, or be continued")


def _check_assistant(field: str, message: Message, version: int) -> None:
    if not message.content and not message.tool_calls:
        raise invalid(field, "an assistant message must have content or tool_calls")
    if message.content and message.tool_calls and version < 7:
        raise invalid(field, "an assistant message must have either content or tool_calls")
    for number, call in enumerate(message.tool_calls):
        name = f"{field}.tool_calls[{number}].id"
        _check_call_id(name, call.id, version)
        if version >= 11 and call.id in [other.id for other in message.tool_calls[:number]]:
            raise invalid(name, f"{call.id!r} is used twice")


def _take_call(field: str, open_calls: list[str], call_id: str, version: int) -> None:
    """One answer less to wait for. Up to v7 only their number counts."""
    if not open_calls:
        raise invalid(field, "answers a call that no assistant message made, or that was answered before")
    if version >= 11 and call_id not in open_calls:
        raise invalid(f"{field}.tool_call_id", f"{call_id[:40]!r} is no open call; open are {', '.join(open_calls)}")
    open_calls.remove(call_id if version >= 11 else open_calls[0])


def _check_answered(field: str, open_calls: list[str]) -> None:
    if open_calls:
        reason = f"{len(open_calls)} tool calls have no answer"
        raise invalid(field, f"every tool call needs one answer before the next turn: {reason}")


def _check_call_id(field: str, call_id: str, version: int) -> None:
    require_utf8(call_id, field)
    if version < 13 and not _CALL_ID.fullmatch(call_id):
        raise invalid(field, f"{call_id[:40]!r} must be 9 letters and digits")
    if not call_id:
        raise invalid(field, "is empty")
