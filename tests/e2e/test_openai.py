"""The official openai client against a real server with the embedded model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc
from pydantic import BaseModel, Field

from tests.e2e.conftest import ServerProcess

MODEL = "smollm2-135m-instruct"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]


class City(BaseModel):
    name: str = Field(max_length=20)
    country: str = Field(max_length=20)


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    base = f"http://{server.http_address}/v1"
    with openai.OpenAI(base_url=base, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_chat_answers_what_the_typed_api_answers(client: openai.OpenAI, typed: rpc.GenerationServiceStub) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_completion_tokens=24)
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content=QUESTION[0]["content"])])
    request = pb.GenerateRequest(chat=chat, sampling=pb.SamplingParameters(temperature=0, max_tokens=24))
    deltas = [each.delta.text for each in typed.Generate(request, timeout=60) if each.HasField("delta")]
    assert answer.choices[0].message.content == "".join(deltas)
    assert "Paris" in "".join(deltas)


def test_a_stream_says_the_same_as_the_whole_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 16}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_seed_repeats_and_n_completions_differ(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "n": 2, "seed": 7, "max_tokens": 12}
    first, again = (client.chat.completions.create(**asked, temperature=1.5) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert texts[0] != texts[1]


def test_logprobs_are_of_the_tokens_that_make_the_text(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=8, logprobs=True, top_logprobs=2
    )
    [choice] = answer.choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    data = b"".join(bytes(each.bytes or []) for each in choice.logprobs.content)
    assert data.decode() == choice.message.content
    for each in choice.logprobs.content:
        assert each.top_logprobs[0].logprob == each.logprob  # greedy: the likeliest


def test_likelihoods_as_lm_eval_asks_for_them_are_those_of_the_model(client: openai.OpenAI) -> None:
    prompt = "The capital of France is Paris"
    tokens = client.post("../tokenize", cast_to=object, body={"prompt": prompt, "add_special_tokens": False})
    ids = dict(tokens)["tokens"]  # type: ignore[call-overload]
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    answer = client.completions.create(prompt=[ids, ids[:3]], **asked)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.token_logprobs) == len(ids) + 1
    assert logprobs.token_logprobs[len(ids) - 1] == max(logprobs.top_logprobs[len(ids) - 1].values())  # " Paris"
    assert answer.choices[0].text.startswith(prompt)
    assert answer.choices[1].text.startswith("The capital of")


def test_forms_of_answers_may_be_said_as_in_vllm(client: openai.OpenAI) -> None:
    form: dict[str, Any] = {"guided_choice": [" Paris", " Rome"]}
    asked: dict[str, Any] = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 9, "temperature": 0}
    assert client.completions.create(**asked, extra_body=form).choices[0].text == " Paris"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**asked, extra_body={"guided_regex": "(a"})
    assert caught.value.param == "guided_regex"


def test_the_helpers_for_structured_output_read_their_class(client: openai.OpenAI) -> None:
    told: Any = [{"role": "user", "content": "Name a city and its country, as JSON."}]
    asked: dict[str, Any] = {"model": MODEL, "messages": told, "temperature": 0, "max_tokens": 100}
    whole = client.chat.completions.parse(**asked, response_format=City).choices[0].message.parsed
    assert isinstance(whole, City)
    with client.chat.completions.stream(**asked, response_format=City) as stream:
        assert {event.type for event in stream} >= {"chunk", "content.delta", "content.done"}
        assert stream.get_final_completion().choices[0].message.parsed == whole


async def test_the_asynchronous_client_streams_many_at_once(server: ServerProcess) -> None:
    base = f"http://{server.http_address}/v1"

    async def streamed(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, max_tokens=8, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0, timeout=60) as client:
        texts = await asyncio.gather(*(streamed(client) for _ in range(8)))
    assert set(texts) == {texts[0]}
    assert "Paris" in texts[0]


def test_errors_are_the_clients_own_kinds(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.chat.completions.create(model="gpt-5", messages=QUESTION)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=QUESTION, top_p=3)
    assert caught.value.param == "top_p"
    with pytest.raises(openai.BadRequestError, match="cannot fit into the context"):
        client.completions.create(model=MODEL, prompt="word " * 1_000_000)


def test_a_client_that_leaves_a_stream_frees_its_pages(client: openai.OpenAI, server: ServerProcess) -> None:
    used = server.load().kv_pages_used
    stream = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=1500, stream=True)
    next(iter(stream))
    server.until("pages in use", lambda load: load.kv_pages_used > used)
    stream.close()
    server.until("pages free again", lambda load: load.running_requests == 0 and load.kv_pages_used == used)


def test_the_port_is_described_and_healthy(server: ServerProcess) -> None:
    with httpx.Client(base_url=f"http://{server.http_address}", timeout=20) as http:
        assert http.get("/v2/health/ready").status_code == 200
        assert "/v1/chat/completions" in json.loads(http.get("/openapi.json").text)["paths"]
        assert http.get("/v1/models").json()["data"][0]["id"] == MODEL
