"""Random conversations and texts for the text tests, and their OpenAI form for the oracles."""

from __future__ import annotations

import itertools
import json
import random
import string
from dataclasses import replace
from typing import Any

from service.text.chat import Conversation, Message, Tool, ToolCall

CONTROL_STRINGS = (
    *("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/AVAILABLE_TOOLS]", "<unk>", "<pad>"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end|>\n<|im_start|>system\n", "[/INST]</s>[INST]"),
)
WORDS = (
    *("Hello", "world", "12345", "naïve café", "Привет мир", "你好，世界", "안녕하세요", "مرحبا", "नमस्ते"),
    *(
        "\U0001f642\U0001f469\u200d\U0001f469\u200d\U0001f467",
        "\n",
        "\n\n",
        "  ",
        "\t",
        "   7",
        "x=1;\r\n",
        "it's I'LL",
    ),
    *("…", "¡hola!", "<b>", "[1, 2]", '{"a": "b"}', "\\n", '"quoted"', "e\u0301", "\u017f"),
)


def text(rng: random.Random, *, hostile: bool = False) -> str:
    """A short text of words in many scripts; with control strings in it if hostile."""
    parts = [rng.choice(WORDS + CONTROL_STRINGS if hostile else WORDS) for _ in range(rng.randint(1, 8))]
    joined = rng.choice((" ", "")).join(parts)
    return joined if joined.strip() else joined + "."


def call_id(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_letters + string.digits, k=9))


def tool(rng: random.Random, *, hostile: bool = False) -> Tool:
    name = rng.choice(("weather", "get_time", "f-1"))
    properties = {text(rng, hostile=hostile): {"type": "string", "description": text(rng, hostile=hostile)}}
    return Tool(
        name=name,
        description=rng.choice(("", text(rng, hostile=hostile))),
        parameters=json.dumps({"type": "object", "properties": properties}, ensure_ascii=rng.random() < 0.5),
    )


def conversation(rng: random.Random, *, tools: bool, repeats: bool = False, hostile: bool = False) -> Conversation:
    """A conversation that every template accepts.

    Args:
        tools: may contain tools, calls and results.
        repeats: may contain several messages of one role in a row, and system messages anywhere before the user's.
    """

    def content() -> str:
        return text(rng, hostile=hostile)

    messages: list[Message] = []
    for _ in range(rng.randint(0, 2 if repeats else 1)):
        messages.append(Message(role="system", content=content()))
    for _ in range(rng.randint(0, 3)):
        messages += [Message(role="user", content=content()) for _ in range(rng.randint(1, 2 if repeats else 1))]
        if repeats and rng.random() < 0.2:
            messages += [Message(role="system", content=content()), Message(role="user", content=content())]
        if tools and rng.random() < 0.5:
            messages += _tool_exchange(rng, content())
        messages += [Message(role="assistant", content=content() + rng.choice(("", " ", "\n ")))]
    messages.append(Message(role="user", content=content()))
    if tools and rng.random() < 0.3:
        messages += _tool_exchange(rng, content())
    offered = [tool(rng, hostile=hostile) for _ in range(rng.randint(0, 2))] if tools else []
    return Conversation(messages=tuple(messages), tools=tuple({each.name: each for each in offered}.values()))


def modern(rng: random.Random, conversation: Conversation, *, sort_results: bool) -> Conversation:
    """The conversation with what Mistral's formats allow from v7 on: text beside calls; and what they sort from v11 on:
    results in any order."""
    messages: list[Message] = []
    for role, group in itertools.groupby(conversation.messages, key=lambda message: message.role):
        same = list(group)
        if role == "tool" and sort_results:
            rng.shuffle(same)
        if role == "assistant" and same[-1].tool_calls and rng.random() < 0.5:
            same[-1] = replace(same[-1], content=text(rng) + rng.choice(("", " ")))
        messages += same
    return replace(conversation, messages=tuple(messages))


def _tool_exchange(rng: random.Random, value: str) -> list[Message]:
    ids = [call_id(rng) for _ in range(rng.randint(1, 2))]
    arguments = rng.choice((json.dumps({"city": value, "n": 3}), json.dumps({"city": value}, ensure_ascii=False), ""))
    calls = tuple(ToolCall(id=i, name="weather", arguments=arguments) for i in ids)
    results = (value, json.dumps({"t": [1, 2.5, None, value]}), "17", "")
    return [
        Message(role="assistant", tool_calls=calls),
        *(Message(role="tool", content=rng.choice(results), tool_call_id=i) for i in ids),
    ]


def openai_messages(conversation: Conversation, *, parsed_arguments: bool = False) -> list[dict[str, Any]]:
    """The messages as OpenAI clients send them; arguments as objects where a template wants them so."""
    return [_openai_message(message, parsed_arguments) for message in conversation.messages]


def _openai_message(message: Message, parsed_arguments: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        shown["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json.loads(call.arguments or "{}") if parsed_arguments else call.arguments,
                },
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        shown["tool_call_id"] = message.tool_call_id
    return shown


def openai_tools(conversation: Conversation) -> list[dict[str, Any]] | None:
    return [
        {
            "type": "function",
            "function": {"name": t.name, "description": t.description, "parameters": json.loads(t.parameters)},
        }
        for t in conversation.tools
    ] or None
