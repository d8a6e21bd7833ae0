"""Tool calls of NeMo's format through the official openai client; a fake engine plays back what the model writes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from msgspec.structs import replace

from service.served import ServedModel
from service.text.load import load_text
from service.text.tokenizer import TextModel
from tests.service.fake_engine import INFO, FakeEngine
from tests.service.http.ports import Port, serving
from tests.service.text.conftest import small_tekken

CALLS = '[{"name": "weather", "arguments": {"city": "Zürich"}}, {"name": "now", "arguments": {}}]'
USER = {"role": "user", "content": "What is the weather in Zürich, and the time?"}
NO_SCHEMA = {"type": "function", "function": {"name": "f", "parameters": []}}
BAD = {"id": "a" * 9, "type": "function", "function": {"name": "a b", "arguments": "{}"}}
ASKED: dict[str, Any] = {
    "model": "toy",
    "messages": [USER],
    "tools": [
        {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {}}}}},
        {"type": "function", "function": {"name": "now", "description": "the time", "parameters": {}}},
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("nemo")
    (made / "tekken.json").write_text(json.dumps(small_tekken("v3")))
    return made


@pytest.fixture(scope="module")
def nemo(folder: Path) -> TextModel:
    return load_text(folder)


@pytest.fixture
async def engine(nemo: TextModel) -> FakeEngine:
    said = [nemo.tokenizer.control_id("[TOOL_CALLS]"), *nemo.tokenizer.encode(CALLS), nemo.tokenizer.eos_id]
    info = replace(INFO, vocab_size=nemo.tokenizer.vocab_size, max_model_len=1024, kv_pages=128)
    return FakeEngine([token for token in said if token is not None], info)


@pytest.fixture
async def port(nemo: TextModel, engine: FakeEngine) -> AsyncIterator[Port]:
    model = ServedModel("toy", ())
    model.ready(engine, nemo)
    async with serving(model) as port:
        yield port


async def test_calls_come_whole_and_their_results_are_taken_back(port: Port, engine: FakeEngine, folder: Path) -> None:
    answer = await port.openai.chat.completions.create(**ASKED)
    [choice] = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    calls: Any = choice.message.tool_calls
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("weather", {"city": "Zürich"}),
        ("now", {}),
    ]
    results = [{"role": "tool", "tool_call_id": call.id, "content": '{"is": 21}'} for call in calls]
    messages = [*ASKED["messages"], choice.message.model_dump(exclude_none=True), *results]
    await port.openai.chat.completions.create(**ASKED | {"messages": messages})
    oracle = MistralTokenizer.from_file(str(folder / "tekken.json"))
    request = ChatCompletionRequest.from_openai(messages, ASKED["tools"])
    assert engine.requests[1].prompt_token_ids == oracle.encode_chat_completion(request).tokens


async def test_calls_are_streamed_name_first(port: Port) -> None:
    names: list[tuple[int, str]] = []
    arguments = ["", ""]
    reasons = []
    async for chunk in await port.openai.chat.completions.create(**ASKED, stream=True):
        [choice] = chunk.choices
        assert not choice.delta.content
        for piece in choice.delta.tool_calls or ():
            assert piece.function is not None
            if piece.function.name:
                assert piece.id is not None
                assert len(piece.id) == 9
                names.append((piece.index, piece.function.name))
            arguments[piece.index] += piece.function.arguments or ""
        reasons.append(choice.finish_reason)
    assert names == [(0, "weather"), (1, "now")]
    assert [json.loads(each) for each in arguments] == [{"city": "Zürich"}, {}]
    assert reasons[-1] == "tool_calls"


async def test_the_clients_own_accumulation_agrees(port: Port) -> None:
    async with port.openai.chat.completions.stream(**ASKED) as stream:
        answer = await stream.get_final_completion()
    calls: Any = answer.choices[0].message.tool_calls
    assert [call.function.arguments for call in calls] == ['{"city": "Zürich"}', "{}"]


async def test_one_call_is_enough_without_parallel_calls(port: Port) -> None:
    answer = await port.openai.chat.completions.create(**ASKED, parallel_tool_calls=False)
    calls: Any = answer.choices[0].message.tool_calls
    assert [call.function.name for call in calls] == ["weather"]
    assert answer.choices[0].finish_reason == "tool_calls"


async def test_a_call_that_is_cut_off_ends_by_length(port: Port) -> None:
    answer = await port.openai.chat.completions.create(**ASKED, max_tokens=20)
    calls: Any = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "length"
    assert '{"city": "Zürich"}'.startswith(calls[0].function.arguments)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [ASKED["tools"][0], ASKED["tools"][0]]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice.function.name"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [BAD]}]}, "messages[1].tool_calls[0].function.name"),
    ],
)
async def test_what_is_wrong_is_named_as_the_client_wrote_it(port: Port, change: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await port.openai.chat.completions.create(**ASKED | change)
    assert caught.value.param == param
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["message"].startswith(f"{param}: ")
