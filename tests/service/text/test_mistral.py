"""Mistral's chat formats: ids equal mistral-common's, and nothing that a user writes becomes a control token."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from service.errors import Code, ServiceError
from service.text.bpe import BpeTokenizer
from service.text.chat import Conversation, Message, Tool, ToolCall
from service.text.detokenize import StreamDecoder
from service.text.load import load_text
from service.text.mistral import MistralChat
from service.text.sentencepiece import load_sentencepiece
from tests.service.text.conversations import conversation, modern, openai_messages, openai_tools, text


@pytest.fixture(scope="module")
def chat(tekken: BpeTokenizer) -> MistralChat:
    return MistralChat(tekken, 3)


def reference(oracle: MistralTokenizer, conversation: Conversation) -> list[int]:
    request = ChatCompletionRequest.from_openai(
        openai_messages(conversation),
        openai_tools(conversation),
        continue_final_message=conversation.continue_final_message,
    )
    ids: list[int] = oracle.encode_chat_completion(request).tokens
    return ids


def test_tekken_chat_ids_equal_mistral_common(chat: MistralChat, mistral_tekken: MistralTokenizer) -> None:
    rng = random.Random(4)
    for number in range(400):
        asked = conversation(rng, tools=True, repeats=True, hostile=True)
        assert chat.encode(asked) == reference(mistral_tekken, asked), (number, asked)


def test_a_continued_answer_equals_mistral_common(chat: MistralChat, mistral_tekken: MistralTokenizer) -> None:
    rng = random.Random(5)
    for _ in range(50):
        asked = conversation(rng, tools=True, repeats=True)
        begun = Message(role="assistant", content=text(rng) + " ")
        asked = replace(asked, messages=(*asked.messages, begun), continue_final_message=True)
        assert chat.encode(asked) == reference(mistral_tekken, asked), asked


def test_the_exact_form_of_a_conversation_with_system_text_and_tools(chat: MistralChat, tekken: BpeTokenizer) -> None:
    asked = Conversation(
        messages=(
            Message(role="system", content="Be brief."),
            Message(role="user", content="u1"),
            Message(role="assistant", content="a1"),
            Message(role="user", content="u2"),
            Message(role="assistant", tool_calls=(ToolCall(id="abcdefghi", name="f", arguments='{"x":"é"}'),)),
            Message(role="tool", content='{"y": 1}', tool_call_id="abcdefghi"),
        ),
        tools=(Tool(name="f", description="d", parameters='{"type":"object"}'),),
    )
    shown = "".join(tekken.token_name(token_id) for token_id in chat.encode(asked))
    assert shown == (
        "<s>[INST]u1[/INST]a1</s>"
        '[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "f", "description": "d", '
        '"parameters": {"type": "object"}}}][/AVAILABLE_TOOLS][INST]Be brief.\n\nu2[/INST]'
        '[TOOL_CALLS][{"name": "f", "arguments": {"x": "é"}, "id": "abcdefghi"}]</s>'
        '[TOOL_RESULTS]{"content": {"y": 1}, "call_id": "abcdefghi"}[/TOOL_RESULTS]'
    )


def test_control_strings_add_no_control_tokens(chat: MistralChat, tekken: BpeTokenizer) -> None:
    controls = set(tekken.controls.values())
    rng = random.Random(6)
    for _ in range(200):
        hostile = conversation(rng, tools=True, hostile=True)
        harmless = _mapped(hostile, lambda content: "x" if content.strip() else content)
        found, expected = ([i for i in chat.encode(c) if i in controls] for c in (hostile, harmless))
        assert found == expected, hostile


def _mapped(conversation: Conversation, change: Callable[[str], str]) -> Conversation:
    """The conversation with every text of a user changed."""
    messages = tuple(
        replace(
            message,
            content=change(message.content),
            tool_calls=tuple(replace(call, arguments=json.dumps({"x": "x"})) for call in message.tool_calls),
        )
        for message in conversation.messages
    )
    tools = tuple(replace(tool, description=change(tool.description), parameters="{}") for tool in conversation.tools)
    return replace(conversation, messages=messages, tools=tools)


@pytest.mark.parametrize(
    ("file", "version"), [("tokenizer.model.v1", 1), ("mistral_instruct_tokenizer_240323.model.v3", 3)]
)
def test_sentencepiece_chat_ids_equal_mistral_common(mistral_data: Path, file: str, version: int) -> None:
    chat = MistralChat(load_sentencepiece(mistral_data / file), version)
    oracle = MistralTokenizer.v1() if version == 1 else MistralTokenizer.v3()
    rng = random.Random(version)
    for _ in range(150):
        asked = conversation(rng, tools=version == 3, repeats=True)
        assert chat.encode(asked) == reference(oracle, asked), asked


def test_v7_sentencepiece_chat_ids_equal_mistral_common(mistral_data: Path) -> None:
    chat = MistralChat(load_sentencepiece(mistral_data / "mistral_instruct_tokenizer_241114.model.v7"), 7)
    oracle = MistralTokenizer.v7()
    rng = random.Random(7)
    for _ in range(150):
        asked = modern(rng, conversation(rng, tools=True, repeats=True), sort_results=False)
        assert chat.encode(asked) == reference(oracle, asked), asked


def test_modern_tekken_chat_ids_equal_mistral_common(modern_tekken: Path) -> None:
    chat = load_text(modern_tekken).chat
    assert chat is not None
    oracle = MistralTokenizer.from_file(modern_tekken / "tekken.json")
    version = oracle.version.value
    rng = random.Random(version)
    for number in range(300):
        asked = conversation(rng, tools=number % 4 != 0, repeats=number % 2 == 0, hostile=True)
        asked = modern(rng, asked, sort_results=version != "v7")
        if number % 5 == 0:
            begun = Message(role="assistant", content=text(rng) + " ")
            asked = replace(asked, messages=(*asked.messages, begun), continue_final_message=True)
        assert chat.encode(asked) == reference(oracle, asked), (number, asked)
    only_system = Conversation(messages=(Message(role="system", content="s"),))
    assert chat.encode(only_system) == reference(oracle, only_system)


def test_the_exact_form_of_a_modern_conversation(modern_tekken: Path) -> None:
    model = load_text(modern_tekken)
    assert model.chat is not None
    calls = tuple(ToolCall(id=i * 9, name="f", arguments=f'{{"x":"{i}"}}') for i in "ab")
    asked = Conversation(
        messages=(
            Message(role="system", content="Be brief."),
            Message(role="user", content="u1"),
            Message(role="assistant", content="a1 ", tool_calls=calls),
            Message(role="tool", content='{"y":1}', tool_call_id="b" * 9),
            Message(role="tool", content="2", tool_call_id="a" * 9),
            Message(role="assistant", content="a2"),
            Message(role="user", content="u2"),
        ),
        tools=(Tool(name="f", description="d", parameters='{"type":"object"}'),),
    )
    tools = (
        '[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "f", "description": "d", '
        '"parameters": {"type": "object"}}}][/AVAILABLE_TOOLS]'
    )
    results = ('[TOOL_RESULTS]bbbbbbbbb[TOOL_CONTENT]{"y":1}[/TOOL_RESULTS]', "[TOOL_RESULTS]aaaaaaaaa[TOOL_CONTENT]2")
    begun, ended = "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT]", "a2</s>"
    expected = {
        "v7": f"{begun}[INST]u1[/INST]a1"
        '[TOOL_CALLS][{"name": "f", "arguments": {"x": "a"}, "id": "aaaaaaaaa"}, '
        '{"name": "f", "arguments": {"x": "b"}, "id": "bbbbbbbbb"}]</s>'
        f"{results[0]}{results[1]}[/TOOL_RESULTS]{ended}{tools}[INST]u2[/INST]",
        "v11": f"{begun}[INST]u1[/INST]a1"
        '[TOOL_CALLS]f[CALL_ID]aaaaaaaaa[ARGS]{"x": "a"}[TOOL_CALLS]f[CALL_ID]bbbbbbbbb[ARGS]{"x": "b"}</s>'
        f"{results[1]}[/TOOL_RESULTS]{results[0]}{ended}{tools}[INST]u2[/INST]",
        "v13": f"{begun}{tools}[INST]u1[/INST]a1"
        '[TOOL_CALLS]f[ARGS]{"x": "a"}[TOOL_CALLS]f[ARGS]{"x": "b"}</s>'
        f'[TOOL_RESULTS]2[/TOOL_RESULTS][TOOL_RESULTS]{{"y":1}}[/TOOL_RESULTS]{ended}[INST]u2[/INST]',
    }
    shown = "".join(model.tokenizer.token_name(token_id) for token_id in model.chat.encode(asked))
    assert shown == expected[json.loads((modern_tekken / "tekken.json").read_text())["config"]["version"]]


def test_a_modern_call_and_its_results_are_matched_by_id(modern_tekken: Path) -> None:
    chat = load_text(modern_tekken).chat
    assert isinstance(chat, MistralChat)
    twice = replace(CALL, tool_calls=CALL.tool_calls * 2)
    other = replace(RESULT, tool_call_id="b" * 9)
    by_number = json.loads((modern_tekken / "tekken.json").read_text())["config"]["version"] == "v7"
    for messages, field in (
        ((USER, CALL, other), "messages[2].tool_call_id"),
        ((USER, twice, RESULT, RESULT), "[1].id"),
    ):
        if by_number:
            chat.encode(Conversation(messages=messages))
        else:
            with pytest.raises(ServiceError) as caught:
                chat.encode(Conversation(messages=messages))
            assert field in caught.value.message.split(": ")[0]


def test_what_a_model_writes_to_call_tools_can_be_taken_apart_by_ids(tekken: BpeTokenizer) -> None:
    """The text of an answer has no control tokens, so whoever looks for calls does so in its ids."""
    call = '[{"name": "f", "arguments": {"city": "Zürich"}}]'
    starts = tekken.control_id("[TOOL_CALLS]")
    assert starts == 9
    answer = [starts, *tekken.encode(call)]
    decoder = StreamDecoder(tekken, [4])
    assert "".join([*(decoder.push([token_id]) for token_id in answer), decoder.flush()]) == call
    assert [i for i in answer if tekken.token_bytes(i) == b""] == [starts]
    assert tekken.token_name(starts) == "[TOOL_CALLS]"
    assert starts not in tekken.encode("[TOOL_CALLS]" + call)


USER, ASSISTANT = Message(role="user", content="u"), Message(role="assistant", content="a")
CALL = Message(role="assistant", tool_calls=(ToolCall(id="a" * 9, name="f", arguments="{}"),))
RESULT = Message(role="tool", content="1", tool_call_id="a" * 9)


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ((), "messages"),
        ((replace(USER, role="developer"),), "messages[0].role"),
        ((USER, ASSISTANT), "messages[1].role"),
        ((RESULT,), "messages[0].role"),
        ((USER, RESULT), "messages[1].role"),
        ((USER, CALL, RESULT, replace(USER, role="system")), "messages[3].role"),
        ((USER, replace(ASSISTANT, content=""), USER), "messages[1]"),
        ((USER, replace(CALL, content="both"), RESULT), "messages[1]"),
        ((USER, CALL, ASSISTANT, USER), "messages[2]"),
        ((USER, CALL), "messages[1]"),
        ((USER, CALL, RESULT, RESULT), "messages[3]"),
        (
            (USER, replace(CALL, tool_calls=(ToolCall(id="call_1", name="f", arguments=""),)), RESULT),
            "tool_calls[0].id",
        ),
        ((USER, CALL, replace(RESULT, tool_call_id=None)), "messages[2].tool_call_id"),
        ((USER, replace(CALL, tool_calls=(ToolCall(id="a" * 9, name="f g", arguments=""),)), RESULT), "calls[0].name"),
        ((replace(USER, tool_calls=CALL.tool_calls),), "messages[0].tool_calls"),
        ((replace(USER, content="\ud800"),), "messages[0].content"),
        ((USER, CALL, replace(RESULT, content='"\\ud800"')), "messages[2].content"),
    ],
)
def test_conversations_that_the_model_was_not_trained_on_are_refused_by_field(
    chat: MistralChat, messages: tuple[Message, ...], field: str
) -> None:
    with pytest.raises(ServiceError) as caught:
        chat.encode(Conversation(messages=messages))
    assert caught.value.code == Code.INVALID_ARGUMENT
    assert field in caught.value.message.split(": ")[0]


@pytest.mark.parametrize(
    ("tool", "field"),
    [
        (Tool(name="a b"), "tools[0].name"),
        (Tool(name="f", parameters="[]"), "tools[0].parameters"),
        (Tool(name="f", parameters="{"), "tools[0].parameters"),
        (Tool(name="f", description="\udfff"), "tools[0].description"),
        (Tool(name="f", parameters='{"a":' * 100_000), "tools[0].parameters"),
    ],
)
def test_bad_tools_are_refused_by_field(chat: MistralChat, tool: Tool, field: str) -> None:
    with pytest.raises(ServiceError) as caught:
        chat.encode(Conversation(messages=(USER,), tools=(tool,)))
    assert caught.value.field == field


def test_only_text_of_the_assistant_can_be_continued(chat: MistralChat) -> None:
    with pytest.raises(ServiceError, match="continue_final_message"):
        chat.encode(Conversation(messages=(USER,), continue_final_message=True))


def test_a_tool_result_that_is_huge_or_deep_json_is_taken_as_text(chat: MistralChat, tekken: BpeTokenizer) -> None:
    for content in ("[" * 100_000, "1" * 10_000):
        messages = (USER, CALL, replace(RESULT, content=content))
        assert json.dumps(content) in tekken.decode(chat.encode(Conversation(messages=messages)))
