"""Chat completions over a fake engine, with the official client and without."""

from __future__ import annotations

from typing import Any
from unittest import mock

import openai
import pytest

from engine import FinishReason, Grammar
from service.errors import Code, ServiceError
from service.generation import Delta, Finished, GenerationRequest, Started, ToolCallDelta, Usage
from service.text.chat import Message, Tool, ToolCall
from tests.service.fake_engine import FakeEngine
from tests.service.fakes import Answer, FakeHost
from tests.service.grpc.ports import served
from tests.service.http.ports import Port, error, events, serving

USER = [{"role": "user", "content": "Hi"}]


async def test_the_official_client_gets_an_answer() -> None:
    async with serving(served(FakeEngine(b"Hello"))) as port:
        answer = await port.openai.chat.completions.create(model="toy", messages=USER, max_tokens=5)
    assert answer.object == "chat.completion"
    assert answer.model == "toy"
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint is not None
    assert answer.system_fingerprint.startswith("fp_")
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Hello", "length")
    assert choice.logprobs is None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5


async def test_a_stream_has_role_content_end_usage_and_done_in_this_order() -> None:
    async with serving(served(FakeEngine(b"Hey"))) as port:
        found = events(await port.chat(max_tokens=3, stream=True, stream_options={"include_usage": True}))
    assert [each["object"] for each in found] == ["chat.completion.chunk"] * 6
    assert len({(each["id"], each["created"], each["model"], each["system_fingerprint"]) for each in found}) == 1
    *chunks, last = found
    assert [each["choices"][0]["delta"] for each in chunks] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "H"},
        {"content": "e"},
        {"content": "y"},
        {},
    ]
    assert [each["choices"][0]["finish_reason"] for each in chunks] == [None, None, None, None, "length"]
    assert [each["usage"] for each in chunks] == [None] * 5
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3


async def test_usage_is_in_no_chunk_unless_asked_for_and_in_each_if_asked_for_continuously() -> None:
    async with serving(served(FakeEngine(b"Hey"))) as port:
        without = events(await port.chat(max_tokens=2, stream=True))
        options = {"include_usage": True, "continuous_usage_stats": True}
        continuous = events(await port.chat(max_tokens=2, stream=True, stream_options=options))
    assert all("usage" not in each for each in without)
    assert [each["usage"]["completion_tokens"] for each in continuous] == [0, 1, 2, 2, 2]


async def test_the_official_client_reads_a_stream() -> None:
    async with serving(served(FakeEngine(b"Hello"))) as port:
        stream = await port.openai.chat.completions.create(model="toy", messages=USER, max_tokens=5, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == "Hello"


async def test_n_completions_are_told_apart_by_their_index() -> None:
    async with serving(served(FakeEngine(b"Hey"))) as port:
        answer = (await port.chat(max_tokens=3, n=2)).json()
        found = events(await port.chat(max_tokens=3, n=2, stream=True))
    assert [(each["index"], each["message"]["content"]) for each in answer["choices"]] == [(0, "Hey"), (1, "Hey")]
    assert answer["usage"]["completion_tokens"] == 6
    choices = [choice for each in found for choice in each["choices"]]
    for index in (0, 1):
        mine = [each for each in choices if each["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(each["delta"].get("content", "") for each in mine) == "Hey"
        assert mine[-1]["finish_reason"] == "length"


async def test_logprobs_name_tokens_with_their_bytes_and_alternatives() -> None:
    async with serving(served(FakeEngine("aé".encode()))) as port:
        answer = (await port.chat(max_tokens=3, logprobs=True, top_logprobs=1)).json()
        found = events(await port.chat(max_tokens=3, logprobs=True, stream=True))
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    assert [each["token"] for each in logprobs["content"]] == ["a", "\\xc3", "\\xa9"]
    assert [each["bytes"] for each in logprobs["content"]] == [[97], [0xC3], [0xA9]]
    assert logprobs["content"][0]["logprob"] == -0.97
    assert logprobs["content"][0]["top_logprobs"] == [{"token": "a", "logprob": -0.97, "bytes": [97]}]
    streamed = [each["choices"][0]["logprobs"] for each in found]
    assert [len(each["content"]) for each in streamed if each] == [1, 1, 1]  # also where no character is whole yet


async def test_every_parameter_reaches_the_engine() -> None:
    host = FakeHost()
    fields: dict[str, Any] = {
        "max_completion_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "repetition_penalty": 1.1,
        "seed": -1,
        "logit_bias": {"5": -100},
        "stop": ["a", "b"],
        "stop_token_ids": [7],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "min_tokens": 2,
        "n": 2,
        "priority": 3,
        "cache_salt": "salt",
        "timeout": 100,
    }
    async with serving(host) as port:
        assert (await port.chat(**fields)).status_code == 200
    [request] = host.requests
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (7, 0.5, 0.9, 40)
    assert (sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty) == (0.1, 1.0, -1.0)
    assert (sampling.repetition_penalty, sampling.seed, sampling.logit_bias) == (1.1, 2**64 - 1, {5: -100.0})
    assert (sampling.stop_token_ids, sampling.ignore_eos, sampling.min_tokens) == ((7,), True, 2)
    assert (request.stop, request.include_stop, request.n) == (("a", "b"), True, 2)
    assert (request.priority, request.cache_salt, request.until_context) == (3, "salt", False)
    assert request.deadline is not None


async def test_what_is_not_given_has_the_defaults_of_openai() -> None:
    host = FakeHost()
    nulls = dict.fromkeys(("temperature", "top_p", "n", "stop", "max_tokens", "logprobs", "tools", "logit_bias"))
    async with serving(host) as port:
        assert (await port.chat(stream=False, **nulls)).status_code == 200
    [request] = host.requests
    assert (request.sampling.temperature, request.sampling.top_p, request.n, request.until_context) == (1, 1, 1, True)
    assert (request.sampling.logprobs, request.stop, request.deadline) == (None, (), None)


async def test_messages_and_tools_become_a_conversation() -> None:
    host = FakeHost()
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": "1+1?", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]
    tool = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}
    named = {"type": "function", "function": {"name": "add"}}
    async with serving(host) as port:
        body = {"messages": messages, "tools": [tool], "tool_choice": named, "parallel_tool_calls": False}
        assert (await port.post("/v1/chat/completions", body)).status_code == 200
    conversation: Any = host.requests[0].prompt
    assert conversation.messages == (
        Message(role="system", content="Be\nbrief"),
        Message(role="user", content="1+1?"),
        Message(role="assistant", tool_calls=(ToolCall(id="c1", name="add", arguments='{"a": 1}'),)),
        Message(role="tool", content="2", tool_call_id="c1"),
    )
    assert conversation.tools == (Tool(name="add", description="adds", parameters='{"type":"object"}'),)
    assert (conversation.tool_choice, conversation.tool_name) == ("required", "add")
    assert not conversation.parallel_tool_calls


class ToolHost(FakeHost):
    """Answers every request with two calls of tools."""

    async def generate(self, request: GenerationRequest) -> Any:
        yield Started(request_id=request.request_id, prompt_tokens=1, cached_tokens=0, queue_seconds=0.0)
        for piece in (
            ToolCallDelta(call=0, id="a", name="add", arguments=""),
            ToolCallDelta(call=0, arguments='{"x": 1}'),
            ToolCallDelta(call=1, id="b", name="now", arguments="{}"),
        ):
            yield Delta(index=0, text="", token_ids=[1], tool_calls=[piece])
        usage = Usage(prompt_tokens=1, completion_tokens=3)
        yield Finished(index=0, reason=FinishReason.STOP, usage=usage, tool_calls=2)


async def test_calls_of_tools_come_whole_and_in_pieces() -> None:
    tools: Any = [{"type": "function", "function": {"name": "add"}}]
    async with serving(ToolHost()) as port:
        whole = await port.openai.chat.completions.create(model="fake", messages=USER, tools=tools)
        pieces = events(await port.chat(tools=tools, stream=True))
    [choice] = whole.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert choice.message.tool_calls is not None
    assert [(each.id, each.function.name, each.function.arguments) for each in choice.message.tool_calls] == [  # type: ignore[union-attr]
        ("a", "add", '{"x": 1}'),
        ("b", "now", "{}"),
    ]
    deltas = [each["choices"][0]["delta"] for each in pieces]
    assert deltas[1:] == [
        {"tool_calls": [{"index": 0, "id": "a", "type": "function", "function": {"name": "add", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"x": 1}'}}]},
        {"tool_calls": [{"index": 1, "id": "b", "type": "function", "function": {"name": "now", "arguments": "{}"}}]},
        {},
    ]
    assert pieces[-1]["choices"][0]["finish_reason"] == "tool_calls"


SCHEMA = {"type": "object"}


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar(kind="json_object")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            Grammar(kind="json_schema", text='{"type":"object"}'),
        ),
        ({"response_format": {"type": "regex", "regex": "a+"}}, Grammar(kind="regex", text="a+")),
        ({"response_format": {"type": "grammar", "grammar": 'start: "a"'}}, Grammar(kind="lark", text='start: "a"')),
        ({"guided_json": SCHEMA}, Grammar(kind="json_schema", text='{"type":"object"}')),
        ({"guided_json": '{"type": "object"}'}, Grammar(kind="json_schema", text='{"type": "object"}')),
        ({"guided_regex": "a+"}, Grammar(kind="regex", text="a+")),
        ({"guided_choice": ["a", 'b"']}, Grammar(kind="lark", text='start: "a" | "b\\""')),
        ({"guided_grammar": 'start: "a"'}, Grammar(kind="lark", text='start: "a"')),
        ({"nvext": {"guided_json": SCHEMA}}, Grammar(kind="json_schema", text='{"type":"object"}')),
        ({"nvext": {"guided_choice": ["a"], "top_k": 3}}, Grammar(kind="lark", text='start: "a"')),
        ({"nvext": None}, None),
        ({"structured_outputs": {"json": SCHEMA}}, Grammar(kind="json_schema", text='{"type":"object"}')),
        ({"structured_outputs": {"choice": ["a"]}}, Grammar(kind="lark", text='start: "a"')),
    ],
)
async def test_a_form_of_the_answer_becomes_a_grammar(fields: dict[str, Any], grammar: Grammar | None) -> None:
    host = FakeHost()
    seen: list[GenerationRequest] = []

    async def record(request: GenerationRequest) -> Any:
        seen.append(request)
        raise ServiceError(Code.UNAVAILABLE, "enough")
        yield

    host.generate = record  # type: ignore[method-assign]
    async with serving(host) as port:
        await port.chat(**fields)
    assert [each.sampling.grammar for each in seen] == [grammar]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": "warm"}, "temperature", "expected `float | null`, got `str`, which is 'warm'"),
        ({"n": 0}, "n", "0 must be between 1 and 128"),
        ({"top_p": 2.0}, "top_p", "2.0 must be"),
        ({"max_tokens": 0}, "max_tokens", "0 must be between 1"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "contradicts"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs", "21 must be between 0 and 20"),
        ({"max_token": 5}, "max_token", "did you mean max_tokens?"),
        ({"nvext": {"guided_jsn": {}}}, "nvext.guided_jsn", "did you mean guided_json?"),
        ({"nvext": {"top_k": 1}, "top_k": 2}, "nvext.top_k", "stands at top level too"),
        ({"nvext": []}, "nvext", "expected `object`, got `array`"),
        ({"nvext": {"top_k": "x"}}, "top_k", "expected `int | null`, got `str`"),
        ({"modalities": ["text", "audio"]}, "modalities", "text alone"),
        ({"functions": [{}]}, "functions", "tools"),
        ({"chat_template": "x"}, "chat_template", "own chat template"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type", "'custom' is not served"),
        ({"tool_choice": "required"}, "tool_choice", "without tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "'a b' is not a"),
        ({"stop": [""]}, "stop[0]", "1 to"),
        ({"timeout": 0}, "timeout", "greater than 0"),
        ({"add_generation_prompt": False}, "add_generation_prompt", "opposite"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'xml' must be"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "guided_regex"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"role": "king", "content": ""}]}, "messages[0].role", "'king' must be one of"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "which is 5"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "'image_url' is not served",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "missing"),
        ({"messages": [{"role": "user", "content": "x" * 115}]}, "messages", "must be fewer than the context of 128"),
        ({"messages": [{"role": "user", "content": "x" * 10**5}]}, "messages", "cannot fit into the context of 128"),
    ],
)
async def test_what_is_wrong_is_refused_by_name_value_and_limit(fields: Any, param: str, words: str) -> None:
    async with serving(served(FakeEngine())) as port:
        found = error(await port.chat(**fields), 400)
    assert (found["type"], found["param"]) == ("invalid_request_error", param)
    assert words in found["message"]


async def test_a_prompt_that_is_too_long_has_the_code_and_the_words_that_clients_look_for() -> None:
    async with serving(served(FakeEngine())) as port:
        chat = error(await port.chat("x" * 115), 400)
        completion = error(await port.complete("x" * 200), 400)
    assert chat["code"] == "context_length_exceeded"
    assert chat["message"].startswith("messages: the prompt is too long: ")
    assert (completion["code"], completion["param"]) == ("context_length_exceeded", "prompt")


async def test_harmless_parameters_change_nothing() -> None:
    harmless = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "modalities": ["text"],
        "reasoning_effort": None,
        "use_beam_search": False,
        "skip_special_tokens": True,
    }
    async with serving(served(FakeEngine(b"Hey"))) as port:
        assert (await port.chat(max_tokens=3, **harmless)).json()["choices"][0]["message"]["content"] == "Hey"


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        (Code.INVALID_ARGUMENT, 400, openai.BadRequestError),
        (Code.UNIMPLEMENTED, 400, openai.BadRequestError),
        (Code.NOT_FOUND, 404, openai.NotFoundError),
        (Code.DEADLINE_EXCEEDED, 408, openai.APIStatusError),
        (Code.RESOURCE_EXHAUSTED, 429, openai.RateLimitError),
        (Code.UNAVAILABLE, 503, openai.InternalServerError),
        (Code.INTERNAL, 500, openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_token_has_its_status(code: Code, status: int, kind: Any, stream: bool) -> None:
    host = FakeHost()
    host.answers[""] = Answer(error=ServiceError(code, "no", retry_after_ms=2500))
    async with serving(host) as port:
        with pytest.raises(kind) as caught:
            await port.openai.chat.completions.create(model="fake", messages=USER, stream=stream)
    assert caught.value.status_code == status
    assert caught.value.code == code.value
    headers = caught.value.response.headers
    if code in (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE):
        assert (headers["retry-after"], headers["retry-after-ms"]) == ("3", "2500")
    else:
        assert "retry-after" not in headers


@pytest.mark.parametrize("code", [Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE])
async def test_the_official_client_comes_again_when_it_was_told_to(code: Code) -> None:
    host = FakeHost()
    host.answers[""] = Answer(error=ServiceError(code, "no", retry_after_ms=700))
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        host.answers.clear()  # by then there is room

    async with serving(host) as port:
        patient = port.openai.with_options(max_retries=2)
        with mock.patch("anyio.sleep", sleep):
            raw = await patient.chat.completions.with_raw_response.create(model="fake", messages=USER, max_tokens=2)
    assert waits == [0.7]
    assert raw.retries_taken == 1
    assert raw.headers["x-request-id"]
    assert raw.parse().choices[0].message.content == " t0 t1"


async def test_an_error_after_the_first_token_is_the_last_event_of_a_stream() -> None:
    host = FakeHost()
    host.answers[""] = Answer(error=ServiceError(Code.UNAVAILABLE, "the engine is down"), error_after=2)
    async with serving(host) as port:
        response = await port.chat(stream=True)
        with pytest.raises(openai.APIError, match="the engine is down"):
            async for _ in await port.openai.chat.completions.create(model="fake", messages=USER, stream=True):
                pass
    assert response.status_code == 200
    last = response.text.split("\n\n")[-2]
    assert last.startswith('data: {"error":{"message":"the engine is down"')
    assert "[DONE]" not in response.text


async def test_a_failed_generation_is_an_error_and_no_short_answer() -> None:
    host = FakeHost()
    host.answers[""] = Answer(finished_error="the logits are not numbers", error_after=2)
    async with serving(host) as port:
        assert error(await port.chat(), 500)["message"] == "the logits are not numbers"


async def _served_names(port: Port) -> list[str]:
    return [each["id"] for each in (await port.http.get("/v1/models")).json()["data"]]


async def test_models_are_listed_and_found_by_each_of_their_names() -> None:
    async with serving(served(FakeEngine())) as port:
        assert await _served_names(port) == ["toy", "short"]
        assert (await port.openai.models.retrieve("short")).id == "short"
        assert error(await port.http.get("/v1/models/other"), 404)["param"] == "model"
        found = error(await port.chat(model="other"), 404)
    assert found["message"] == "model: 'other' is not served here; served are toy, short"
