"""The real tritonclient, synchronous in a thread and asynchronous, used as its documentation shows."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

from tests.service.fakes import Answer, FakeHost, Gate
from tests.service.grpc.kserve.conftest import Running, serving
from tests.service.grpc.kserve.toys import Echo, Repeat, Sums

SECONDS = 20


def text_input(value: str, shape: tuple[int, ...] = (1,), name: str = "text_input") -> triton.InferInput:
    made = triton.InferInput(name, list(shape), "BYTES")
    made.set_data_from_numpy(np.array([value.encode()], object).reshape(shape))
    return made


def flag(name: str, value: bool) -> triton.InferInput:
    made = triton.InferInput(name, [1], "BOOL")
    made.set_data_from_numpy(np.array([value]))
    return made


async def in_thread(running: Running, use: Callable[[triton.InferenceServerClient], Any]) -> Any:
    """What `use` returns, run with a synchronous client beside the server's event loop."""

    def run() -> Any:
        with triton.InferenceServerClient(running.address) as client:
            return use(client)

    return await asyncio.wait_for(asyncio.to_thread(run), SECONDS)


async def test_every_question_of_the_client_is_answered(llm: Running) -> None:
    def use(client: triton.InferenceServerClient) -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("fake")
        assert not client.is_model_ready("nope")
        assert client.get_server_metadata(as_json=True)["name"] == "nemoserve"
        assert client.get_model_metadata("ensemble").inputs[0].shape == [-1, 1]
        assert client.get_model_config("vllm_model").config.model_transaction_policy.decoupled
        assert len(client.get_inference_statistics().model_stats) == 4
        assert len(client.get_model_repository_index().models) == 4
        assert client.get_system_shared_memory_status(as_json=True) == {}
        assert client.get_cuda_shared_memory_status(as_json=True) == {}
        assert client.get_trace_settings().settings["trace_level"].value == ["OFF"]
        assert client.update_log_settings({}).settings["log_error"].bool_param
        for refused, status in (
            (lambda: client.load_model("fake"), "UNAVAILABLE"),
            (lambda: client.unload_model("fake"), "UNAVAILABLE"),
            (lambda: client.register_system_shared_memory("x", "/x", 64), "UNIMPLEMENTED"),
            (lambda: client.update_trace_settings(settings={"trace_rate": "5"}), "UNIMPLEMENTED"),
            (lambda: client.get_model_config("nope"), "NOT_FOUND"),
        ):
            with pytest.raises(InferenceServerException) as caught:
                refused()
            assert caught.value.status() == f"StatusCode.{status}"

    await in_thread(llm, use)


async def test_numpy_arrays_come_back_as_they_should() -> None:
    def use(client: triton.InferenceServerClient) -> None:
        inputs = []
        for name, low in (("a", 0), ("b", 100)):
            inputs.append(triton.InferInput(name, [2, 16], "INT32"))
            inputs[-1].set_data_from_numpy(np.arange(low, low + 32, dtype=np.int32).reshape(2, 16))
        result = client.infer("sums", inputs, outputs=[triton.InferRequestedOutput("difference")], request_id="7")
        assert (result.as_numpy("difference") == -100).all()
        assert result.as_numpy("sum") is None
        assert result.get_response().id == "7"
        waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        client.async_infer("sums", inputs, callback=lambda result, error: waiting.put((result, error)))
        result, error = waiting.get(timeout=SECONDS)
        assert error is None
        assert (result.as_numpy("sum") == np.arange(100, 164, 2).reshape(2, 16)).all()

    async with serving([Sums()]) as running:
        await in_thread(running, use)


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
async def test_a_large_text_makes_the_round_trip(compression: str | None) -> None:
    large = "0123456789abcdef" * 2**20

    def use(client: triton.InferenceServerClient) -> bytes:
        result = client.infer("echo", [text_input(large, name="text")], compression_algorithm=compression)
        return bytes(result.as_numpy("text")[0])

    async with serving([Echo()]) as running:
        assert await in_thread(running, use) == large.encode()


async def test_a_stream_by_callback(llm: Running) -> None:
    def use(client: triton.InferenceServerClient) -> tuple[str, list[str]]:
        texts, errors = [], []

        def arrived(result: triton.InferResult | None, error: InferenceServerException | None) -> None:
            if error is not None:
                errors.append(error.message())
            elif result is not None:
                texts.append(result.as_numpy("text_output")[0].decode())

        client.start_stream(arrived)
        inputs = [text_input("hi"), flag("stream", True)]
        client.async_stream_infer("fake", inputs, request_id="a", parameters={"max_tokens": 4})
        client.async_stream_infer("fake", [text_input("", (1,)), flag("stream", True)], request_id="b")
        client.stop_stream()  # waits for the answers
        return "".join(texts), errors

    text, errors = await in_thread(llm, use)
    assert text == " t0 t1 t2 t3"
    assert [error.split(":")[0] for error in errors] == ["text_input"]


async def test_stopping_a_stream_with_cancel_requests_returns_at_once(llm: Running, host: FakeHost) -> None:
    host.answers["hi"] = Answer(gate=Gate())
    arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def begin(client: triton.InferenceServerClient) -> None:
        client.start_stream(lambda result, error: arrived.put(error))
        client.async_stream_infer("fake", [text_input("hi"), flag("stream", True)])

    client = triton.InferenceServerClient(llm.address)
    await asyncio.to_thread(begin, client)
    await host.until(lambda: host.running == 1)
    await asyncio.wait_for(asyncio.to_thread(client.stop_stream, cancel_requests=True), 5)
    await host.until(lambda: host.running == 0)
    assert arrived.get(timeout=SECONDS).status() == "StatusCode.CANCELLED"
    client.close()


async def test_the_asynchronous_client_streams_and_knows_the_end_without_an_empty_response(llm: Running) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        inputs = [text_input("hi", (1, 1)), *(number("max_tokens", 3),), flag("stream", True)]
        yield {"model_name": "ensemble", "inputs": inputs, "request_id": "x"}

    def number(name: str, value: int) -> triton.InferInput:
        made = triton.InferInput(name, [1, 1], "INT32")
        made.set_data_from_numpy(np.array([[value]], np.int32))
        return made

    async with triton_aio.InferenceServerClient(llm.address) as client:
        results = [pair async for pair in client.stream_infer(requests())]
    assert [error for _, error in results] == [None] * len(results)
    assert "".join(result.as_numpy("text_output")[0].decode() for result, _ in results) == " t0 t1 t2"
    assert results[-1][0].get_response().parameters["triton_final_response"].bool_param


@pytest.mark.parametrize("enable", [True, False])
async def test_the_client_can_ask_for_the_empty_final_response(enable: bool) -> None:
    def use(client: triton.InferenceServerClient) -> int:
        arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        client.start_stream(lambda result, error: arrived.put((result, error)))
        count = triton.InferInput("count", [1], "INT32")
        count.set_data_from_numpy(np.array([2], np.int32))
        client.async_stream_infer("repeat", [count], enable_empty_final_response=enable)
        client.stop_stream()
        return arrived.qsize()

    async with serving([Repeat()]) as running:
        assert await in_thread(running, use) == (3 if enable else 2)
