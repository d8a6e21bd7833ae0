"""The whole activator in front of a real nemoserve server with a fake engine, and the clients that people use."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import openai
import pytest
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from autoscaler.activator import Activator, ActivatorSettings, Addresses, HoldLimits, Replica
from tests.autoscaler.activator.scene import assert_nothing_is_left, until
from tests.service.fakes import Gate
from tests.service.lives import Life, config, living


@dataclass
class Front:
    activator: Activator
    addresses: Addresses
    folder: Path

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.addresses.grpc_port}"

    @asynccontextmanager
    async def server(self) -> AsyncIterator[Life]:
        """A server that is ready, and that the activator is told of."""
        async with living(config(self.folder, http_address="127.0.0.1:0")) as life:
            addresses = (life.address, life.server.ports.http_address or "")
            self.activator.room.serve(
                [Replica("real", "127.0.0.1", *(int(each.rpartition(":")[2]) for each in addresses), capacity=8)]
            )
            yield life

    async def held(self, count: int) -> None:
        await until(lambda: self.activator.room.held_requests == count)


@pytest.fixture
async def front(tmp_path: Path) -> AsyncIterator[Front]:
    limits = HoldLimits(comment_after_seconds=0.01)
    settings = ActivatorSettings(grpc_address="127.0.0.1:0", http_address="127.0.0.1:0", limits=limits)
    activator = Activator(settings)
    yield Front(activator, await activator.start(), tmp_path)
    await activator.stop(1)
    assert_nothing_is_left(activator.room)


@pytest.fixture
async def official(front: Front) -> AsyncIterator[openai.AsyncOpenAI]:
    base = f"http://127.0.0.1:{front.addresses.http_port}/v1"
    async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture
async def triton(front: Front) -> AsyncIterator[InferenceServerClient]:
    client = InferenceServerClient(front.grpc_address)
    yield client
    await client.close()


def inputs(prompt: str) -> list[Any]:
    made = []
    for name, value in (("text_input", prompt), ("sampling_parameters", json.dumps({"max_tokens": 3}))):
        made.append(InferInput(name, [1], "BYTES"))
        made[-1].set_data_from_numpy(np.array([value.encode()], dtype=object))
    return made


async def test_the_official_client_streams_and_waits(front: Front, official: openai.AsyncOpenAI) -> None:
    asks: Any = {"model": "toy", "prompt": "Hi", "max_tokens": 3}
    stream = await official.completions.create(**asks, stream=True)  # begun by a comment: there is no server yet
    whole = asyncio.create_task(official.completions.create(**asks))
    await front.held(2)
    async with front.server():
        assert "".join([chunk.choices[0].text async for chunk in stream if chunk.choices]) == "abc"
        assert (await whole).choices[0].text == "abc"


async def test_the_official_client_gets_the_servers_errors(front: Front, official: openai.AsyncOpenAI) -> None:
    asks: Any = {"model": "other", "prompt": "Hi"}
    whole = asyncio.create_task(official.completions.create(**asks))
    stream = await official.completions.create(**asks, stream=True)
    await front.held(2)
    async with front.server():
        with pytest.raises(openai.NotFoundError) as error:
            await whole
        assert error.value.code == "not_found"
        with pytest.raises(openai.APIError) as event:
            await anext(aiter(stream))
        assert event.value.code == "not_found"


async def test_tritonclient_is_held_and_answered(front: Front, triton: InferenceServerClient) -> None:
    asked = asyncio.ensure_future(triton.infer("toy", inputs("Hi")))
    await front.held(1)
    async with front.server():
        assert (await asked).as_numpy("text_output")[0].endswith(b"abc")
        with pytest.raises(InferenceServerException) as error:
            await triton.infer("other", inputs("Hi"))
        assert error.value.status() == "StatusCode.NOT_FOUND"


async def test_a_triton_stream_of_several_requests_is_held_and_flows(front: Front) -> None:
    client = InferenceServerClient(front.grpc_address)
    later = asyncio.Event()

    async def requests() -> AsyncIterator[dict[str, Any]]:
        for number in range(3):
            yield {"model_name": "toy", "inputs": inputs("Hi"), "request_id": str(number)}
            await later.wait()

    answers = aiter(client.stream_infer(requests()))
    first = asyncio.ensure_future(anext(answers))
    await front.held(1)
    async with front.server():
        result, error = await first
        assert error is None
        assert result.get_response().id == "0"
        later.set()
        ids = ["0"] + [result.get_response().id async for result, error in answers]
        assert set(ids) == {"0", "1", "2"}
    await client.close()


async def test_what_runs_ends_in_peace_when_the_activator_stops(front: Front) -> None:
    async with front.server() as life, grpc.aio.insecure_channel(front.grpc_address) as channel:
        life.engine.gate = Gate()
        life.engine.gate.allow()
        typed: Any = rpc.GenerationServiceStub(channel)
        request = pb.GenerateRequest(prompt="Hi", sampling=pb.SamplingParameters(max_tokens=3))
        answers = aiter(typed.Generate(request, timeout=20))
        assert (await anext(answers)).HasField("started")
        stopping = asyncio.create_task(front.activator.stop(10))
        await until(lambda: front.activator.room.closed)
        life.engine.gate.allow(10)
        assert "".join([each.delta.text async for each in answers]) == "abc"
        await asyncio.wait_for(stopping, 10)


async def test_a_port_that_is_taken_is_told_and_nothing_listens(front: Front) -> None:
    taken = ActivatorSettings(grpc_address="127.0.0.1:0", http_address=f"127.0.0.1:{front.addresses.http_port}")
    with pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1:\d+ for HTTP: it is in use"):
        await Activator(taken).start()
    taken = ActivatorSettings(grpc_address=front.grpc_address, http_address="127.0.0.1:0")
    with pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1:\d+ for gRPC: it is in use"):
        await Activator(taken).start()
