"""`nemoserve.v1.GenerationService` over the wire: the real port, model and generator over a fake engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from msgspec.structs import replace
from nemoserve.v1 import generation_pb2 as pb

from engine import Done, EngineStats, Grammar, SamplingParams
from service.served import ServedModel
from service.text.chat import Conversation, Message, Tool, ToolCall
from service.text.check import MAX_MESSAGES, MAX_TOOLS
from service.version import VERSION
from tests.service.fake_engine import BOS, END, INFO, PADDING, FakeEngine, toy_text
from tests.service.fakes import FakeHost, Gate
from tests.service.grpc.ports import Port, drained, refusal, served, serving


@pytest.fixture
async def engine() -> FakeEngine:
    return FakeEngine(b"abc")


@pytest.fixture
async def port(engine: FakeEngine) -> AsyncIterator[Port]:
    async with serving(served(engine)) as running:
        yield running


def ask(prompt: str = "Hi", **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=prompt, sampling=pb.SamplingParameters(**{"max_tokens": 3} | sampling))


async def generate(port: Port, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    return [response async for response in port.typed.Generate(request, timeout=10)]


# -- Generate --------------------------------------------------------------------------------------------------------


async def test_the_stream_is_started_deltas_finished(port: Port) -> None:
    started, *deltas, finished = await generate(port, ask("Hi", logprobs=2))
    assert (started.started.model, started.started.prompt_tokens, started.started.cached_tokens) == ("toy", 3, 1)
    assert [(each.delta.text, list(each.delta.token_ids)) for each in deltas] == [("a", [97]), ("b", [98]), ("c", [99])]
    [logprob] = deltas[0].delta.logprobs
    assert (logprob.token_id, logprob.token, logprob.rank, logprob.logprob) == (97, b"a", 2, pytest.approx(-0.97))
    assert [(top.token_id, top.token) for top in logprob.top] == [(97, b"a"), (98, b"b")]
    assert finished.finished.reason == pb.FINISH_REASON_LENGTH
    assert finished.finished.usage == pb.Usage(prompt_tokens=3, completion_tokens=3, cached_tokens=1)
    assert finished.finished.timings.finished >= finished.finished.timings.first_token
    assert finished.finished.WhichOneof("matched_stop") is None


async def test_logprobs_of_a_long_prompt_come_in_several_messages_before_the_first_delta() -> None:
    engine = FakeEngine(info=replace(INFO, max_model_len=2048, kv_pages=200))
    prompt = [token % 200 for token in range(1200)]
    sampling = pb.SamplingParameters(max_tokens=1, n=2, prompt_logprobs=2)
    async with serving(served(engine)) as port:
        responses = await generate(port, pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling))
    kinds = [response.WhichOneof("event") for response in responses]
    assert kinds[:5] == ["started", "prompt_logprobs", "prompt_logprobs", "prompt_logprobs", "delta"]
    assert "prompt_logprobs" not in kinds[5:]
    entries = [entry for response in responses for entry in response.prompt_logprobs.logprobs]
    expected = [(token, bytes([token]), 1 + token % 2) for token in prompt[1:]]
    assert [(entry.token_id, entry.token, entry.rank) for entry in entries] == expected
    assert [entry.logprob for entry in entries] == pytest.approx([-token / 100 for token in prompt[1:]])
    assert [[top.token_id for top in entry.top] for entry in entries] == [[token, token + 1] for token in prompt[1:]]


async def test_more_logprobs_of_a_prompt_than_one_request_may_have_are_refused() -> None:
    engine = FakeEngine(info=replace(INFO, max_model_len=2**18, kv_pages=2**15))
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[1] * 13_000), sampling=pb.SamplingParameters(max_tokens=1, prompt_logprobs=20)
    )
    async with serving(served(engine)) as port:
        error = await refusal(port.typed.Generate(request, timeout=10))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert (
        "prompt_logprobs: 20 with a prompt of 13000 tokens makes 273000 logprobs, but at most 262144" in error.details()
    )


async def test_every_sampling_field_reaches_the_engine(engine: FakeEngine, port: Port) -> None:
    given = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 0.25,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.75,
        "seed": 2**64 - 1,
        "logprobs": 4,
        "prompt_logprobs": 3,
        "logit_bias": {97: -100.0},
        "stop_token_ids": [98],
        "ignore_eos": True,
    }
    request = ask(**given)
    request.priority, request.cache_salt = -3, "tenant"
    await generate(port, request)
    assert engine.requests[0].sampling == SamplingParams(**given | {"stop_token_ids": (98,)})
    assert (engine.requests[0].priority, engine.requests[0].cache_salt) == (-3, "tenant")


async def test_zero_is_a_value_and_unset_is_the_default(engine: FakeEngine, port: Port) -> None:
    await generate(port, ask(temperature=0))
    await generate(port, pb.GenerateRequest(prompt="Hi"))
    zero, unset = (request.sampling for request in engine.requests)
    assert (zero.temperature, zero.max_tokens) == (0.0, 3)
    assert (unset.temperature, unset.max_tokens) == (SamplingParams().temperature, INFO.max_model_len - 3)
    assert "max_tokens" in (await refusal(port.typed.Generate(ask(max_tokens=0)))).details()


async def test_token_ids_and_stop_strings_and_n(engine: FakeEngine, port: Port) -> None:
    sampling = pb.SamplingParameters(max_tokens=9, n=2, stop=["c"], include_stop=True)
    responses = await generate(port, pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2]), sampling=sampling))
    texts = {index: "".join(r.delta.text for r in responses if r.delta.index == index) for index in (0, 1)}
    assert texts == {0: "abc", 1: "abc"}
    assert [r.finished.stop for r in responses if r.HasField("finished")] == ["c", "c"]
    assert [request.prompt_token_ids for request in engine.requests] == [[1, 2]] * 2


async def test_a_stop_token_that_was_asked_for_is_named(port: Port) -> None:
    *_, last = await generate(port, ask(stop_token_ids=[98]))
    assert (last.finished.WhichOneof("matched_stop"), last.finished.stop_token_id) == ("stop_token_id", 98)


async def test_a_failed_generation_ends_with_its_error(engine: FakeEngine, port: Port) -> None:
    engine.fails_after = 1
    *_, last = await generate(port, ask())
    assert (last.finished.reason, last.finished.error) == (pb.FINISH_REASON_ERROR, "the logits are not numbers")


async def test_chats_and_their_tools_arrive_whole() -> None:
    host = FakeHost()
    call = pb.ToolCall(id="c1", name="f", arguments_json='{"x": 1}')
    chat = pb.Chat(
        messages=[
            pb.ChatMessage(role="user", content="hi"),
            pb.ChatMessage(role="assistant", tool_calls=[call]),
            pb.ChatMessage(role="tool", content="2", tool_call_id="c1"),
        ],
        tools=[pb.Tool(name="f", description="d", parameters_json='{"type": "object"}'), pb.Tool(name="g")],
        continue_final_message=True,
    )
    async with serving(host) as port:
        await generate(port, pb.GenerateRequest(chat=chat))
    assert host.requests[0].prompt == Conversation(
        messages=(
            Message(role="user", content="hi"),
            Message(role="assistant", tool_calls=(ToolCall(id="c1", name="f", arguments='{"x": 1}'),)),
            Message(role="tool", content="2", tool_call_id="c1"),
        ),
        tools=(Tool(name="f", description="d", parameters='{"type": "object"}'), Tool(name="g")),
        continue_final_message=True,
    )


@pytest.mark.parametrize(
    ("given", "choice", "name", "parallel"),
    [
        ({}, "auto", None, True),
        ({"tool_choice": pb.TOOL_CHOICE_AUTO, "parallel_tool_calls": False}, "auto", None, False),
        ({"tool_choice": pb.TOOL_CHOICE_NONE, "parallel_tool_calls": True}, "none", None, True),
        ({"tool_choice": pb.TOOL_CHOICE_REQUIRED}, "required", None, True),
        ({"tool_choice": pb.TOOL_CHOICE_REQUIRED, "tool_name": "f"}, "required", "f", True),
        ({"tool_name": "f"}, "required", "f", True),
    ],
)
async def test_the_choice_of_tools_arrives(
    given: dict[str, Any], choice: str, name: str | None, parallel: bool
) -> None:
    host = FakeHost()
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")], tools=[pb.Tool(name="f")], **given)
    async with serving(host) as port:
        await generate(port, pb.GenerateRequest(chat=chat))
    asked = host.requests[0].prompt
    assert isinstance(asked, Conversation)
    assert (asked.tool_choice, asked.tool_name, asked.parallel_tool_calls) == (choice, name, parallel)


@pytest.mark.parametrize(
    ("given", "field"),
    [({"tool_choice": 9}, "tool_choice: 9"), ({"tool_choice": 1, "tool_name": "f"}, "tool_name: 'f'")],
)
async def test_a_choice_of_tools_that_is_none_is_refused(given: dict[str, Any], field: str, port: Port) -> None:
    error = await refusal(port.typed.Generate(pb.GenerateRequest(chat=pb.Chat(**given)), timeout=10))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith(field)


async def test_a_conversation_of_too_many_parts_is_refused_before_they_are_made(port: Port) -> None:
    """An empty message has two bytes on the wire, so that eight million of them fit into a request."""
    for field, chat in (
        ("messages", pb.Chat(messages=[pb.ChatMessage()] * (MAX_MESSAGES + 1))),
        ("tool_calls", pb.Chat(messages=[pb.ChatMessage(tool_calls=[pb.ToolCall()] * (MAX_MESSAGES // 2 + 1))] * 2)),
        ("tools", pb.Chat(messages=[pb.ChatMessage()], tools=[pb.Tool()] * (MAX_TOOLS + 1))),
    ):
        for call in (
            port.typed.Generate(pb.GenerateRequest(chat=chat)),
            port.typed.Tokenize(pb.TokenizeRequest(chat=chat)),
        ):
            refused = await refusal(call)
            assert refused.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert (refused.details() or "").startswith(f"{field}: has ")


async def test_what_is_wrong_with_a_tool_is_named_as_in_the_contract(port: Port) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")], tools=[pb.Tool(name="f", parameters_json="[")])
    error = await refusal(port.typed.Generate(pb.GenerateRequest(chat=chat), timeout=10))
    assert error.details() == "tools[0].parameters_json: is not a JSON object"


async def test_calls_of_tools_come_in_pieces_that_join() -> None:
    call = b'So: <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
    engine = FakeEngine([*call, END], replace(INFO, max_model_len=512))
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")], tools=[pb.Tool(name="f")])
    async with serving(served(engine)) as port:
        _, *deltas, finished = await generate(port, pb.GenerateRequest(chat=chat))
    assert "".join(each.delta.text for each in deltas) == "So: "
    first, *rest = (piece for each in deltas for piece in each.delta.tool_calls)
    assert (first.call, first.name, first.id.startswith("call_")) == (0, "f", True)
    assert {(piece.call, piece.name, piece.id) for piece in rest} == {(0, "", "")}
    assert "".join(piece.arguments_json for piece in (first, *rest)) == '{"x": 1}'
    assert (finished.finished.tool_calls, finished.finished.reason) == (1, pb.FINISH_REASON_STOP)


async def test_nothing_not_even_metadata_is_sent_before_the_first_token(engine: FakeEngine, port: Port) -> None:
    engine.gate = Gate()
    call = port.typed.Generate(ask(max_tokens=1), timeout=10)
    metadata = asyncio.ensure_future(call.initial_metadata())
    await engine.until(lambda: len(engine.requests) == 1)
    await port.typed.GetLoad(pb.GetLoadRequest())  # on the same connection: what was sent before has arrived
    assert not metadata.done()
    engine.gate.allow()
    await asyncio.wait_for(metadata, 10)
    assert [response.WhichOneof("event") async for response in call] == ["started", "delta", "finished"]


# -- request ids -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "header", "used"), [("mine", "other", "mine"), ("", "other", "other"), ("x" * 256, None, "x" * 256)]
)
async def test_a_request_id_is_echoed_in_started_and_in_the_trailers(
    port: Port, field: str, header: str | None, used: str
) -> None:
    request = ask()
    request.request_id = field
    call = port.typed.Generate(request, metadata=(("x-request-id", header),) if header else None)
    started, *_, finished = [response async for response in call]
    assert started.started.request_id == used
    assert finished.HasField("finished")
    assert dict(await call.trailing_metadata())["x-request-id"] == used


async def test_requests_without_an_id_get_different_ones(port: Port) -> None:
    ids = [(await generate(port, ask()))[0].started.request_id for _ in range(2)]
    assert all(ids)
    assert ids[0] != ids[1]


async def test_an_error_carries_the_request_id_too(port: Port) -> None:
    error = await refusal(port.typed.Generate(pb.GenerateRequest(request_id="mine", prompt="x", model="other")))
    assert dict(error.trailing_metadata())["x-request-id"] == "mine"


# -- grammars --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "grammar"),
    [
        (pb.ResponseFormat(), None),
        (pb.ResponseFormat(json=False), None),
        (pb.ResponseFormat(json=True), Grammar(kind="json_object")),
        (pb.ResponseFormat(json_schema="{}"), Grammar(kind="json_schema", text="{}")),
        (pb.ResponseFormat(regex="a+"), Grammar(kind="regex", text="a+")),
        (pb.ResponseFormat(grammar='start: "a"'), Grammar(kind="lark", text='start: "a"')),
    ],
)
async def test_a_response_format_becomes_a_grammar(
    engine: FakeEngine, port: Port, form: pb.ResponseFormat, grammar: Grammar | None
) -> None:
    async for _ in port.typed.Generate(pb.GenerateRequest(prompt="x", response_format=form), timeout=10):
        pass
    assert [request.sampling.grammar for request in engine.requests] == [grammar]


async def test_the_engine_is_told_the_vocabulary_when_the_model_is_ready(engine: FakeEngine, port: Port) -> None:
    assert engine.vocabulary is not None
    assert engine.vocabulary.tokens[97] == b"a"
    names = [engine.vocabulary.tokens[token] for token in engine.vocabulary.special]
    assert names == [b"<s>", b"</s>", b"<|end|>"]


# -- refusals --------------------------------------------------------------------------------------------------------


def chat(**fields: Any) -> pb.Chat:
    return pb.Chat(messages=[pb.ChatMessage(**{"role": "user", "content": "x"} | fields)])


@pytest.mark.parametrize(
    ("request_", "code", "names"),
    [
        (pb.GenerateRequest(), "INVALID_ARGUMENT", ["input", "prompt, token_ids and chat"]),
        (pb.GenerateRequest(prompt="x", model="gpt"), "NOT_FOUND", ["'gpt'", "toy", "short"]),
        (pb.GenerateRequest(prompt="x", model="g" * 100_000), "NOT_FOUND", ["ggg"]),
        (pb.GenerateRequest(prompt="x", request_id="a\nb"), "INVALID_ARGUMENT", ["request_id", "printable"]),
        (pb.GenerateRequest(prompt="x", request_id="x" * 257), "INVALID_ARGUMENT", ["request_id", "257", "256"]),
        (pb.GenerateRequest(prompt="x", adapter="a"), "NOT_FOUND", ["adapter: 'a' is not loaded; loaded are none"]),
        (pb.GenerateRequest(prompt="x", cache_salt="é" * 257), "INVALID_ARGUMENT", ["cache_salt: 257", "256"]),
        (
            pb.GenerateRequest(prompt="x", response_format=pb.ResponseFormat(regex="")),
            "INVALID_ARGUMENT",
            ["response_format: the regex is empty"],
        ),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "INVALID_ARGUMENT", ["prompt", "0 tokens"]),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**32 - 1])), "INVALID_ARGUMENT", ["[0]", "4294967295", "259"]),
        (pb.GenerateRequest(prompt="x" * 200), "INVALID_ARGUMENT", ["prompt", "200", "128"]),
        (pb.GenerateRequest(chat=pb.Chat()), "INVALID_ARGUMENT", ["messages", "empty"]),
        (pb.GenerateRequest(chat=chat(role="wizard")), "INVALID_ARGUMENT", ["messages[0].role", "wizard"]),
        (ask(max_tokens=-1), "INVALID_ARGUMENT", ["max_tokens", "-1"]),
        (ask(n=-1), "INVALID_ARGUMENT", ["n: -1", "128"]),
        (ask(top_p=float("nan")), "INVALID_ARGUMENT", ["top_p", "nan"]),
        (ask(logit_bias={97: float("inf")}), "INVALID_ARGUMENT", ["logit_bias[97]", "inf", "100"]),
        (ask(stop=["é" * 100_000]), "INVALID_ARGUMENT", ["stop[0]", "100000", "1024"]),
        (ask(logprobs=21), "INVALID_ARGUMENT", ["logprobs", "21", "20"]),
        (ask(prompt_logprobs=21), "INVALID_ARGUMENT", ["prompt_logprobs: 21", "20"]),
        (ask(prompt_logprobs=-1), "INVALID_ARGUMENT", ["prompt_logprobs: -1", "0"]),
    ],
)
async def test_a_bad_request_is_refused_by_name(
    engine: FakeEngine, port: Port, request_: pb.GenerateRequest, code: str, names: list[str]
) -> None:
    error = await refusal(port.typed.Generate(request_, timeout=10))
    assert error.code() == grpc.StatusCode[code]
    assert [name for name in names if name not in error.details()] == []
    assert engine.requests == []


@pytest.mark.parametrize("phase", ["loading", "draining", "failed"])
async def test_a_model_that_is_not_ready_is_unavailable(phase: str) -> None:
    model = ServedModel("toy") if phase == "loading" else served(FakeEngine())
    if phase == "draining":
        model.draining()
        model.refuse()
    if phase == "failed":
        model.failed("secret reason")
    async with serving(model) as port:
        error = await refusal(port.typed.Generate(ask(), timeout=10))
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert "secret" not in error.details()


# -- the other calls -------------------------------------------------------------------------------------------------


async def test_tokenize_and_detokenize(port: Port) -> None:
    plain = await port.typed.Tokenize(pb.TokenizeRequest(text="é<s>"))
    assert list(plain.token_ids) == [*"é<s>".encode()]
    assert (await port.typed.Detokenize(pb.DetokenizeRequest(token_ids=plain.token_ids))).text == "é<s>"
    special = await port.typed.Tokenize(pb.TokenizeRequest(model="short", text="a", add_special_tokens=True))
    assert list(special.token_ids) == [BOS, 97]
    whole = await port.typed.Tokenize(pb.TokenizeRequest(chat=chat()))
    assert list(whole.token_ids) == [BOS, *b"user:x", END, BOS, *b"assistant:"]


@pytest.mark.parametrize(
    ("method", "request_", "code", "names"),
    [
        ("Tokenize", pb.TokenizeRequest(), "INVALID_ARGUMENT", ["input"]),
        ("Tokenize", pb.TokenizeRequest(text="x" * 129), "INVALID_ARGUMENT", ["129", "128"]),
        ("Tokenize", pb.TokenizeRequest(model="m", text="x"), "NOT_FOUND", ["'m'", "toy"]),
        ("Detokenize", pb.DetokenizeRequest(token_ids=[1, PADDING]), "INVALID_ARGUMENT", ["token_ids[1]", "258"]),
        ("Detokenize", pb.DetokenizeRequest(token_ids=[1] * 129), "INVALID_ARGUMENT", ["token_ids", "129", "128"]),
        ("Detokenize", pb.DetokenizeRequest(model="m"), "NOT_FOUND", ["'m'", "toy"]),
        ("GetModel", pb.GetModelRequest(model="m"), "NOT_FOUND", ["'m'", "toy"]),
        ("WatchLoad", pb.WatchLoadRequest(interval_seconds=0.01), "INVALID_ARGUMENT", ["interval_seconds", "0.1"]),
        ("WatchLoad", pb.WatchLoadRequest(interval_seconds=float("nan")), "INVALID_ARGUMENT", ["interval_seconds"]),
    ],
)
async def test_the_other_calls_refuse_by_name_as_well(
    port: Port, method: str, request_: Any, code: str, names: list[str]
) -> None:
    error = await refusal(getattr(port.typed, method)(request_, timeout=10))
    assert error.code() == grpc.StatusCode[code]
    assert [name for name in names if name not in error.details()] == []


async def test_the_model_tells_what_it_is(port: Port) -> None:
    model = (await port.typed.GetModel(pb.GetModelRequest(model="short"))).model
    assert model == pb.Model(
        name="toy",
        aliases=["short"],
        architecture=INFO.architecture,
        parameters=1234,
        dtype="float32",
        max_model_len=INFO.max_model_len,
        vocab_size=260,
        chat=True,
    )
    assert list((await port.typed.ListModels(pb.ListModelsRequest())).models) == [model]


async def test_the_load_is_that_of_the_engine(engine: FakeEngine, port: Port) -> None:
    engine.stats = EngineStats(
        queued=2,
        queued_tokens=70,
        oldest_queued_seconds=1.5,
        running=3,
        max_batch_size=8,
        kv_pages_used=5,
        kv_pages_total=64,
        prefill_tokens_per_second=100.0,
        decode_tokens_per_second=10.0,
    )
    load = (await port.typed.GetLoad(pb.GetLoadRequest())).load
    assert load.started_at > 1.7e9
    load.ClearField("started_at")
    assert load == pb.Load(
        phase=pb.PHASE_READY,
        progress=1.0,
        queued_requests=2,
        queued_tokens=70,
        oldest_queued_seconds=1.5,
        running_requests=3,
        capacity=8,
        kv_pages_used=5,
        kv_pages_total=64,
        prefill_tokens_per_second=100.0,
        decode_tokens_per_second=10.0,
        engine_version=VERSION,
        kv_page_tokens=INFO.page_size,
        max_step_tokens=INFO.max_batch_tokens,
    )


async def test_the_load_counts_what_arrived_and_what_ended(engine: FakeEngine, port: Port) -> None:
    engine.gate = Gate()
    waiting = port.typed.Generate(ask(max_tokens=3))
    await engine.until(lambda: len(engine.requests) == 1)
    load = (await port.typed.GetLoad(pb.GetLoadRequest())).load
    assert (load.arrived_requests, load.finished_requests) == (1, 0)
    assert load.arrived_prompt_tokens == len(engine.requests[0].prompt_token_ids)
    engine.gate.allow(3)
    await drained(waiting)
    load = (await port.typed.GetLoad(pb.GetLoadRequest())).load
    assert (load.arrived_requests, load.finished_requests) == (1, 1)


async def test_a_server_without_a_model_has_no_sizes() -> None:
    async with serving(ServedModel("toy")) as port:
        load = (await port.typed.GetLoad(pb.GetLoadRequest())).load
    assert (load.kv_page_tokens, load.max_step_tokens, load.arrived_requests) == (0, 0, 0)


async def test_watch_load_follows_a_server_through_its_life() -> None:
    model = ServedModel("toy")
    async with serving(model) as port:
        watch = port.typed.WatchLoad(pb.WatchLoadRequest(interval_seconds=60), timeout=10)

        async def phase() -> tuple[int, float]:
            load = (await watch.read()).load
            return load.phase, load.progress

        assert await phase() == (pb.PHASE_LOADING, 0.0)
        model.loading("read weights", Done(0.5))
        assert await phase() == (pb.PHASE_LOADING, 0.5)
        model.ready(FakeEngine(), toy_text())
        assert await phase() == (pb.PHASE_READY, 1.0)
        model.draining()
        assert await phase() == (pb.PHASE_DRAINING, 1.0)
        model.failed("gone")
        assert await phase() == (pb.PHASE_FAILED, 0.0)


async def test_watch_load_repeats_itself_once_per_interval(port: Port) -> None:
    watch = port.typed.WatchLoad(pb.WatchLoadRequest(interval_seconds=0.1), timeout=10)
    assert {(await watch.read()).load.phase for _ in range(3)} == {pb.PHASE_READY}
    watch.cancel()
