"""Tool calls of a real server: a random model of NeMo's shape and chat format, held to calls by a grammar."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc
from openai.types.chat import ChatCompletionMessageFunctionToolCall

from tests.e2e.conftest import ServerProcess
from tests.service.text.conftest import small_tekken
from tests.tiny_models import write_hf

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Zürich"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
}


@pytest.fixture(scope="module")
def nemo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder: Path = write_hf(tmp_path_factory.mktemp("nemo"), vocab_size=9000)
    (folder / "tekken.json").write_text(json.dumps(small_tekken("v3")))
    running = ServerProcess.start(folder, "--served-model-name", "nemo")
    yield running
    assert running.stop() == 0, "".join(running.lines)


def chat(**fields: object) -> pb.GenerateRequest:
    tools = [pb.Tool(name="weather", parameters_json=json.dumps(SCHEMA)), pb.Tool(name="now")]
    given = pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")], tools=tools, **fields)  # type: ignore[arg-type]
    return pb.GenerateRequest(chat=given, sampling=pb.SamplingParameters(temperature=1.0, seed=7, max_tokens=200))


def calls(nemo: ServerProcess, request: pb.GenerateRequest) -> list[tuple[str, str]]:
    made: list[tuple[str, str]] = []
    with nemo.channel() as channel:
        for event in rpc.GenerationServiceStub(channel).Generate(request, timeout=60):
            assert not event.delta.text
            for piece in event.delta.tool_calls:
                if piece.name:
                    made.append((piece.name, ""))
                made[-1] = (made[-1][0], made[-1][1] + piece.arguments_json)
    return made


def test_a_named_tool_is_called_once_with_arguments_that_fit(nemo: ServerProcess) -> None:
    [(name, arguments)] = calls(nemo, chat(tool_name="weather"))
    assert name == "weather"
    given = json.loads(arguments)
    assert given["city"] in ("Paris", "Zürich")
    assert 1 <= given["days"] <= 9


def test_required_calls_are_of_the_tools_that_there_are(nemo: ServerProcess) -> None:
    made = calls(nemo, chat(tool_choice=pb.TOOL_CHOICE_REQUIRED))
    assert made
    assert {name for name, _ in made} <= {"weather", "now"}


def test_a_schema_that_makes_no_grammar_is_refused_by_name(nemo: ServerProcess) -> None:
    request = chat(tool_name="weather")
    request.chat.tools[0].parameters_json = '{"properties": {"a": {"type": "nonsense"}}, "required": ["a"]}'
    with pytest.raises(grpc.RpcError) as caught:
        calls(nemo, request)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith("tools: ")


def test_the_openai_client_gets_a_required_call(nemo: ServerProcess) -> None:
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
    base = f"http://{nemo.http_address}/v1"
    asked: dict[str, Any] = {"model": "nemo", "messages": [{"role": "user", "content": "Hi"}], "tools": [tool]}
    asked |= {"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 200, "seed": 7}
    with openai.OpenAI(base_url=base, api_key="none", max_retries=0, timeout=60) as client:
        [choice] = client.chat.completions.create(**asked).choices
        with client.chat.completions.stream(**asked) as stream:
            [streamed] = stream.get_final_completion().choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    for message in (choice.message, streamed.message):
        [call] = message.tool_calls or []
        assert isinstance(call, ChatCompletionMessageFunctionToolCall)
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Zürich")
