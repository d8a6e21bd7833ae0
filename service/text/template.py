"""Chat templates of checkpoints (Jinja) at token level: no text of a user can become a control token.

    messages ──hide──► messages of markers ──render──► template text + markers ──split──► literals and user strings
                                                                                              │
          ids  ◄──  control tokens of literals by id, plain runs (literal + user text together) encoded as text

A template never sees what a user wrote, only a marker for it. So control tokens are looked for in the template's own
text alone. Plain literals are joined with the user text beside them before encoding, so that ids equal those of
transformers' `apply_chat_template` for text without control strings.

A marker tells what happened to it. White space around it that is gone: the template trimmed (`|trim`), and the user
text is trimmed. Backslashes before its quote: it went through JSON (`|tojson`), and so does the user text. A marker
that is missing or changed in another way is an error, never lost text.

Limits, by design: a template that looks into text (`'</think>' in content`, `content[0]`, `content|length`,
`content.strip('\\n')`) sees the marker, so text that would have been changed there stays as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine import UnsupportedModelError
from service.errors import invalid
from service.text.chat import Conversation, Message, Tool
from service.text.check import check_answers, check_conversation, parse_json
from service.text.plain import require_utf8
from service.text.sandbox import MAX_OUTPUT, TOO_DEEP, CompiledTemplate

# U+2000 and U+2001 are white space to str.strip, and no template writes them. The letters show a change of case.
_HEAD, _OPEN, _CLOSE, _TAIL = "\u2000", "\ue000", "\ue001", "\u2001"
_MAX_JSON_ROUNDS = 3
_MAX_GROWTH = 8  # texts shown twice, or JSON of text full of control characters
_MARKER = re.compile(rf'({_HEAD}?){_OPEN}Mk(\d+)(\\*)"{_CLOSE}({_TAIL}?)')

# Words of JSON schemas that templates look for by name. They pass unhidden: none can be part of a control token.
_SCHEMA_WORDS = frozenset(
    (
        *("type", "properties", "required", "description", "enum", "items", "default", "title", "format"),
        *("anyOf", "oneOf", "allOf", "$ref", "$defs", "definitions", "additionalProperties"),
        *("minimum", "maximum", "nullable", "const"),
        *("string", "object", "integer", "number", "boolean", "array", "null"),
    )
)


@dataclass(frozen=True, slots=True)
class _Hidden:
    field: str
    text: str
    required: bool


class TemplateChat:
    """`service.text.tokenizer.ChatTemplate` around a Jinja template.

    Args:
        source: the template.
        controls: control tokens by name, as they may stand in the template's own text.
        encode: ids of a run of plain text between control tokens.
        variables: `bos_token`, `eos_token`, … as templates expect them.

    Raises:
        CheckpointError: the template cannot be compiled or used.
    """

    def __init__(
        self,
        source: str,
        *,
        controls: Mapping[str, int],
        encode: Callable[[str], list[int]],
        variables: Mapping[str, str],
    ) -> None:
        if _OPEN in source or _CLOSE in source:
            raise UnsupportedModelError("chat template: contains the private characters U+E000 or U+E001")
        self._template = CompiledTemplate(source)
        self._controls = {name: token_id for name, token_id in controls.items() if name}
        self._lengths = sorted({len(name) for name in self._controls}, reverse=True)
        starts = "".join(sorted({name[0] for name in self._controls}))
        self._start = re.compile(f"[{re.escape(starts)}]") if starts else re.compile(r"(?!)")
        self._encode = encode
        self._variables = dict(variables)

    def encode(self, conversation: Conversation) -> list[int]:
        check_conversation(conversation)
        check_answers(conversation.messages)
        hidden = _Hiding()
        try:
            messages = [hidden.message(f"messages[{i}]", message) for i, message in enumerate(conversation.messages)]
            tools = [hidden.tool(f"tools[{i}]", tool) for i, tool in enumerate(conversation.tools)]
        except RecursionError:
            raise invalid("messages", TOO_DEEP) from None
        rendered = self._template.render(
            {
                **self._variables,
                "messages": messages,
                "tools": tools or None,
                "documents": None,
                "add_generation_prompt": not conversation.continue_final_message,
            }
        )
        if conversation.continue_final_message:
            rendered = _cut_after(rendered, str(messages[-1]["content"]), f"messages[{len(messages) - 1}].content")
        return self._ids(hidden.reveal(rendered))

    def _ids(self, pieces: Iterator[tuple[str, bool]]) -> list[int]:
        """Ids of (text, is it the template's own) pieces."""
        ids: list[int] = []
        run: list[str] = []
        for text, own in pieces:
            for part in self._split(text) if own else (text,):
                if isinstance(part, int):
                    ids += self._plain(run)
                    ids.append(part)
                    run = []
                else:
                    run.append(part)
        return ids + self._plain(run)

    def _split(self, text: str) -> Iterator[str | int]:
        """Plain parts of the template's own text, and ids of the control tokens between them; the longest name wins.

        Not one regular expression of all names: Tekken has a thousand, and trying all of them at each "<" takes
        minutes for a text of nothing else.
        """
        end = 0
        for match in self._start.finditer(text):
            if (at := match.start()) < end:
                continue
            for length in self._lengths:
                if (token_id := self._controls.get(text[at : at + length])) is not None:
                    yield text[end:at]
                    yield token_id
                    end = at + length
                    break
        yield text[end:]

    def _plain(self, run: list[str]) -> list[int]:
        text = "".join(run)
        return self._encode(text) if text else []


class _Hiding:
    """Swaps texts of a conversation for markers, and back."""

    def __init__(self) -> None:
        self._hidden: list[_Hidden] = []

    def message(self, field: str, message: Message) -> dict[str, Any]:
        """A message as templates know it: {role, content, tool_calls?, tool_call_id?}."""
        shown: dict[str, Any] = {"role": message.role}
        shown["content"] = self.text(f"{field}.content", message.content, required=True)
        if message.tool_calls:
            shown["tool_calls"] = [
                {
                    "id": self.text(f"{field}.tool_calls[{i}].id", call.id),
                    "type": "function",
                    "function": {
                        "name": self.text(f"{field}.tool_calls[{i}].name", call.name, required=True),
                        "arguments": self.json(
                            f"{field}.tool_calls[{i}].arguments", parse_json(call.arguments or "{}")
                        ),
                    },
                }
                for i, call in enumerate(message.tool_calls)
            ]
        if message.tool_call_id is not None:
            shown["tool_call_id"] = self.text(f"{field}.tool_call_id", message.tool_call_id)
        return shown

    def tool(self, field: str, tool: Tool) -> dict[str, Any]:
        """A tool as templates know it: {type, function: {name, description, parameters}}."""
        function = {
            "name": self.text(f"{field}.name", tool.name, required=True),
            "description": self.text(f"{field}.description", tool.description),
            "parameters": self.json(f"{field}.parameters", parse_json(tool.parameters or "{}")),
        }
        return {"type": "function", "function": function}

    def json(self, field: str, value: Any) -> Any:
        """`value` with every string and key hidden, but for the words of JSON schemas."""
        if isinstance(value, str):
            return value if value in _SCHEMA_WORDS else self.text(field, value, required=True)
        if isinstance(value, list):
            return [self.json(field, item) for item in value]
        if isinstance(value, dict):
            return {self.json(field, key): self.json(field, item) for key, item in value.items()}
        return value

    def text(self, field: str, text: str, *, required: bool = False) -> str:
        """A marker for `text`; blank text stays as it is, so that templates can ask whether there is any."""
        require_utf8(text, field)
        if not text.strip(" \t\r\n"):
            return text
        self._hidden.append(_Hidden(field, text, required))
        return f'{_HEAD}{_OPEN}Mk{len(self._hidden) - 1}"{_CLOSE}{_TAIL}'

    def reveal(self, rendered: str) -> Iterator[tuple[str, bool]]:
        """Pieces of the rendered text: (literal of the template, True) and (text of the user, False).

        Raises:
            ServiceError: INVALID_ARGUMENT, the template lost or changed a text that must be there.
        """
        # With a cut-off tail (continue_final_message) everything required still stands before the cut.
        pieces: list[tuple[str, bool]] = []
        seen: set[int] = set()
        end, room = 0, MAX_OUTPUT + _MAX_GROWTH * sum(len(hidden.text) for hidden in self._hidden)
        for match in _MARKER.finditer(rendered):
            head, number, slashes, tail = match.groups()
            pieces.append((rendered[end : match.start()], True))
            text = _transformed(self._hidden[int(number)], head, tail, len(slashes))
            pieces.append((text, False))
            if (room := room - len(text)) < 0:
                raise invalid("messages", "the model's chat template repeats the texts of the conversation too often")
            seen.add(int(number))
            end = match.end()
        pieces.append((rendered[end:], True))
        for text, own in pieces:
            if own and (_OPEN in text or _CLOSE in text):
                raise invalid("messages", "the model's chat template changes the texts of the conversation")
        for number, hidden in enumerate(self._hidden):
            if hidden.required and number not in seen:
                raise invalid(hidden.field, "the model's chat template has no place for it")
        return iter(pieces)


def _transformed(hidden: _Hidden, head: str, tail: str, slashes: int) -> str:
    """The text after what its marker went through: trimming, and rounds of JSON (n rounds leave 2**n - 1 slashes)."""
    text = hidden.text if head else hidden.text.lstrip()
    text = text if tail else text.rstrip()
    rounds = (slashes + 1).bit_length() - 1
    if rounds > _MAX_JSON_ROUNDS:  # each may double the text
        raise invalid(hidden.field, f"the model's chat template writes it as JSON {rounds} times over")
    for _ in range(rounds):
        text = json.dumps(text, ensure_ascii=False)[1:-1]
    return text


def _cut_after(rendered: str, marker: str, field: str) -> str:
    """`rendered` up to the end of the last message's text."""
    start = rendered.rfind(marker.strip())
    if start < 0 or not marker.strip():
        raise invalid(field, "is empty or has no place in the model's chat template, so it cannot be continued")
    end = start + len(marker.strip())
    return rendered[: end + rendered[end:].startswith(_TAIL)]
