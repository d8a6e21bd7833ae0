"""LiteLLM, by each of the providers that people configure for a server like this one."""

from __future__ import annotations

import json
from typing import Any

import litellm
import pytest
from pydantic import BaseModel, Field

from tests.clients.conftest import MODEL
from tests.server import ServerProcess

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]},
    },
}

providers = pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "litellm_proxy"])


class City(BaseModel):
    name: str = Field(max_length=20)


def at(server: ServerProcess, provider: str, model: str = MODEL, **fields: Any) -> dict[str, Any]:
    base = f"http://{server.http_address}/v1"
    return {"model": f"{provider}/{model}", "api_base": base, "api_key": "none", "max_retries": 0} | fields


@providers
async def test_a_stream_says_what_the_whole_answer_says(server: ServerProcess, provider: str) -> None:
    given = at(server, provider, messages=QUESTION, temperature=0, max_tokens=16)
    whole = litellm.completion(**given)
    stream = await litellm.acompletion(**given, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert "Paris" in text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


@providers
def test_parameters_and_structured_output(server: ServerProcess, provider: str) -> None:
    given = at(server, provider, messages=QUESTION, max_tokens=60, seed=1, top_p=0.9, stop=["zz"], user="ann", n=2)
    choices = litellm.completion(**given, response_format=City).choices
    assert len([City.model_validate_json(each.message.content) for each in choices]) == 2


@providers
def test_tools(nemo: ServerProcess, provider: str) -> None:
    given = at(nemo, provider, "nemo", messages=QUESTION, max_tokens=200, seed=7, tools=[TOOL], tool_choice="required")
    [choice] = litellm.completion(**given).choices
    assert choice.finish_reason == "tool_calls"
    streamed = litellm.stream_chunk_builder(list(litellm.completion(**given, stream=True)))
    for message in (choice.message, streamed.choices[0].message):
        assert message.tool_calls
        for call in message.tool_calls:
            assert call.function.name == "weather"
            assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


@pytest.mark.parametrize("provider", ["text-completion-openai", "hosted_vllm"])
def test_completions(server: ServerProcess, provider: str) -> None:
    given = at(server, provider, prompt="The capital of France is", max_tokens=4, temperature=0)
    assert litellm.text_completion(**given).choices[0].text.startswith(" Paris")


@providers
def test_errors_are_its_own_kinds(server: ServerProcess, provider: str) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):  # by which its router takes another model
        litellm.completion(**at(server, provider, messages=[{"role": "user", "content": "word " * 20_000}]))
    with pytest.raises(litellm.NotFoundError, match="the model has no embeddings"):
        litellm.embedding(**at(server, provider, input=["x"]))
    with pytest.raises(litellm.NotFoundError, match="is not served here"):
        litellm.completion(**at(server, provider, "nobody", messages=QUESTION))
