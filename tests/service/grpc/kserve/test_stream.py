"""ModelStreamInfer: who gets which message, and what ends when."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2 as pb

from service.host import Phase, Status
from tests.service.fakes import Answer, FakeHost, Gate
from tests.service.grpc.kserve.calls import ask, is_final, iter_requests, outputs, stream, text, vllm
from tests.service.grpc.kserve.conftest import Running, serving
from tests.service.grpc.kserve.toys import Echo, Failing, Firehose, Repeat

EMPTY_FINAL = "triton_enable_empty_final_response"


@pytest.fixture
async def toys() -> AsyncIterator[Running]:
    async with serving([Echo(), Failing(), Repeat()]) as running:
        yield running


def gated(host: FakeHost, *prompts: str) -> dict[str, Gate]:
    gates = {prompt: Gate() for prompt in prompts}
    host.answers |= {prompt: Answer(gate=gate) for prompt, gate in gates.items()}
    return gates


async def read(call: Any, *, messages: int = 1) -> list[pb.ModelStreamInferResponse]:
    return [await asyncio.wait_for(call.read(), 10) for _ in range(messages)]


# -- order and identity ------------------------------------------------------------------------------------------------


async def test_requests_interleave_and_are_told_apart_by_id(llm: Running, host: FakeHost) -> None:
    gates = gated(host, "A", "B")
    call = llm.stub.ModelStreamInfer()
    for prompt in gates:
        await call.write(vllm(prompt, id=prompt, max_tokens=3))
    seen = []
    for prompt in ("A", "B", "B", "A", "A", "B"):
        gates[prompt].allow()
        (message,) = await read(call)
        seen.append((message.infer_response.id, text(message.infer_response)))
    assert seen == [("A", " t0"), ("B", " t0"), ("B", " t1"), ("A", " t1"), ("A", " t2"), ("B", " t2")]
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


async def test_many_requests_on_one_stream_each_get_their_own_answer(llm: Running) -> None:
    requests = [vllm(f"prompt {n}", id=str(n), max_tokens=n % 7 + 1) for n in range(100)]
    texts: dict[str, str] = defaultdict(str)
    finals: list[str] = []
    for message in await stream(llm.stub, *requests):
        response = message.infer_response
        assert response.id not in finals
        texts[response.id] += text(response)
        finals += [response.id] * is_final(response)
    assert texts == {str(n): "".join(f" t{i}" for i in range(n % 7 + 1)) for n in range(100)}
    assert sorted(finals, key=int) == [str(n) for n in range(100)]


# -- the final flag ----------------------------------------------------------------------------------------------------


async def test_the_final_flag_sits_on_the_last_text(llm: Running, host: FakeHost) -> None:
    gate = gated(host, "A")["A"]
    call = llm.stub.ModelStreamInfer(iter_requests(vllm("A", max_tokens=2)))
    messages = []
    for _ in range(2):
        gate.allow()
        messages += await read(call)
    assert [(text(m.infer_response), is_final(m.infer_response)) for m in messages] == [(" t0", False), (" t1", True)]
    assert await call.read() is grpc.aio.EOF


async def test_an_answer_of_no_tokens_is_one_final_empty_text(llm: Running, host: FakeHost) -> None:
    host.answers["A"] = Answer(pieces=())
    (message,) = await stream(llm.stub, vllm("A"))
    assert (outputs(message.infer_response), is_final(message.infer_response)) == ({"text_output": [""]}, True)


@pytest.mark.parametrize("wish", [True, False, None])
async def test_the_empty_final_response_is_for_those_who_ask(toys: Running, wish: bool | None) -> None:
    parameters = {} if wish is None else {EMPTY_FINAL: wish}
    messages = await stream(toys.stub, ask("repeat", id="x", parameters=parameters, count=2))
    flags = [is_final(message.infer_response) for message in messages]
    assert flags == ([False, False, True] if wish else [False, False])
    if wish:
        last = messages[-1].infer_response
        assert (last.model_name, last.model_version, last.id, len(last.outputs)) == ("repeat", "", "x", 0)


async def test_no_empty_final_response_follows_a_final_one_with_data(toys: Running) -> None:
    messages = await stream(toys.stub, ask("repeat", parameters={EMPTY_FINAL: True}, count=2, tell=True))
    assert [is_final(message.infer_response) for message in messages] == [False, True]


async def test_the_one_response_of_a_model_that_is_not_decoupled_is_final(toys: Running) -> None:
    (message,) = await stream(toys.stub, ask("echo", parameters={EMPTY_FINAL: True}, text="hi"))
    assert is_final(message.infer_response)


# -- errors ------------------------------------------------------------------------------------------------------------


async def test_an_error_is_a_message_with_its_request_and_spares_the_others(toys: Running) -> None:
    messages = await stream(
        toys.stub,
        ask("nope", id="unknown"),
        ask("repeat", id="broken", count=3, fail_at=2),
        ask("failing", id="bug", code=5),
        ask("repeat", id="good", count=3, tell=True),
    )
    errors = {m.infer_response.id: m.error_message for m in messages if m.error_message}
    assert errors.pop("bug").startswith("internal error ")
    assert errors == {"unknown": "Request for unknown model: 'nope' is not found", "broken": "broke at 2"}
    assert all(is_final(m.infer_response) and m.infer_response.model_name for m in messages if m.error_message)
    numbers = [outputs(m.infer_response)["number"] for m in messages if m.infer_response.id == "good"]
    assert numbers == [[0], [1], [2]]


async def test_with_triton_grpc_error_the_first_error_ends_the_stream_and_the_siblings(
    llm: Running, host: FakeHost
) -> None:
    gated(host, "A", "B")
    call = llm.stub.ModelStreamInfer(metadata=(("triton_grpc_error", "true"),))
    await call.write(vllm("A", id="A"))
    await call.write(vllm("B", id="B"))
    await host.until(lambda: host.running == 2)
    await call.write(vllm("C", id="C", temperature=-1))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "temperature" in caught.value.details()
    await host.until(lambda: host.running == 0)
    assert len(host.cancelled) == 2


async def test_a_malformed_message_ends_the_stream_with_a_status(llm: Running, host: FakeHost) -> None:
    gated(host, "A")
    async with grpc.aio.insecure_channel(llm.address) as channel:
        call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")()
        await call.write(vllm("A").SerializeToString())
        await host.until(lambda: host.running == 1)
        await call.write(b"\xff\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read(call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    await host.until(lambda: host.running == 0)


# -- ends --------------------------------------------------------------------------------------------------------------


async def test_half_close_lets_everything_end(llm: Running, host: FakeHost) -> None:
    gates = gated(host, "A", "B")
    call = llm.stub.ModelStreamInfer(iter_requests(vllm("A", max_tokens=2), vllm("B", max_tokens=2)))
    await host.until(lambda: host.running == 2)
    for gate in gates.values():
        gate.allow(2)
    messages = [message async for message in call]
    assert sum(is_final(message.infer_response) for message in messages) == 2
    assert await call.code() is grpc.StatusCode.OK
    assert host.cancelled == []


async def test_cancelling_the_stream_cancels_every_request(llm: Running, host: FakeHost) -> None:
    gated(host, "A", "B", "C")
    call = llm.stub.ModelStreamInfer(iter_requests(*(vllm(prompt) for prompt in "ABC")))
    await host.until(lambda: host.running == 3)
    call.cancel()
    await host.until(lambda: host.running == 0)
    assert len(host.cancelled) == 3


async def test_the_deadline_of_the_stream_cancels_every_request(llm: Running, host: FakeHost) -> None:
    gated(host, "A", "B")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream(llm.stub, vllm("A"), vllm("B"), timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await host.until(lambda: host.running == 0)
    assert len(host.cancelled) == 2


async def test_after_a_hundred_cancelled_streams_the_next_is_served_its_own_answer(
    llm: Running, host: FakeHost
) -> None:
    gates = gated(host, "A")
    for n in range(100):
        call = llm.stub.ModelStreamInfer(iter_requests(vllm("A", id=f"gone {n}", max_tokens=100)))
        gates["A"].allow(2)
        await read(call)
        call.cancel()
        await host.until(lambda: host.running == 0)
        gates["A"] = Gate()
        host.answers["A"] = Answer(gate=gates["A"])
    messages = await stream(llm.stub, vllm("B", id="after", max_tokens=3))
    assert {message.infer_response.id for message in messages} == {"after"}
    assert "".join(text(message.infer_response) for message in messages) == " t0 t1 t2"
    assert len(host.cancelled) == 100


# -- slow readers, busy clients ----------------------------------------------------------------------------------------


async def test_a_reader_that_stops_pauses_its_own_model_only() -> None:
    slow = Firehose()
    async with serving([slow, Echo()]) as running:
        call = running.stub.ModelStreamInfer(iter_requests(ask("firehose", count=2000, size=2**16))).__aiter__()
        await anext(call)
        for n in range(300):
            assert outputs(await running.stub.ModelInfer(ask("echo", text=str(n)), timeout=10)) == {"text": [str(n)]}
        # What the queue holds, and what HTTP/2 windows on both sides do.
        assert slow.produced < 200
        rest = [message async for message in call]
        assert len(rest) == 1999
        assert is_final(rest[-1].infer_response)


async def test_a_stalled_stream_can_still_be_cancelled() -> None:
    slow = Firehose()
    async with serving([slow]) as running:
        call = running.stub.ModelStreamInfer(iter_requests(ask("firehose", count=10**6, size=2**16)))
        await read(call)
        call.cancel()
        await asyncio.wait_for(slow.stopped.wait(), 10)


async def test_a_client_that_asks_for_too_much_at_once_waits_its_turn(
    llm: Running, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.grpc.kserve.stream.MAX_REQUESTS", 2)
    gates = gated(host, "A", "B", "C")
    call = llm.stub.ModelStreamInfer(iter_requests(*(vllm(prompt, id=prompt, max_tokens=1) for prompt in gates)))
    await host.until(lambda: host.running == 2)
    for _ in range(20):  # time enough to take the third, if it were to
        await llm.stub.ServerLive(pb.ServerLiveRequest())
    assert host.running == 2
    for gate in gates.values():
        gate.allow()
    assert {message.infer_response.id async for message in call} == {"A", "B", "C"}


# -- phases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [Phase.LOADING, Phase.DRAINING, Phase.FAILED])
async def test_new_streams_are_refused_unless_ready(llm: Running, host: FakeHost, phase: Phase) -> None:
    await host.set_status(Status(phase))
    call = llm.stub.ModelStreamInfer()  # whose client writes nothing: a write that fails would hide the status from it
    assert await call.code() is grpc.StatusCode.UNAVAILABLE


async def test_draining_lets_old_streams_end_and_refuses_their_new_requests_in_band(
    llm: Running, host: FakeHost
) -> None:
    gate = gated(host, "A")["A"]
    call = llm.stub.ModelStreamInfer()
    await call.write(vllm("A", id="old", max_tokens=2))
    gate.allow()
    await read(call)
    await host.set_status(Status(Phase.DRAINING))
    await call.write(vllm("B", id="new"))
    (refused,) = await read(call)
    assert (refused.infer_response.id, "draining" in refused.error_message) == ("new", True)
    gate.allow()
    (last,) = await read(call)
    assert (last.infer_response.id, is_final(last.infer_response)) == ("old", True)
