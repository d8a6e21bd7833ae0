"""The real clients of all three protocols, each with one request that ends in exactly one way.

A client that hears nothing for HANG_SECONDS calls it a hang, and fails its test.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Any

import grpc
import numpy as np
import openai
import tritonclient.grpc.aio as triton
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc
from tritonclient.utils import InferenceServerException

from tests.e2e.conftest import ServerProcess

HANG_SECONDS = 120.0
MODEL = "model"


class End(StrEnum):
    """How a request ended, as its client saw it."""

    DONE = "all tokens came"
    LEFT = "its client went away"
    DEADLINE = "its deadline passed"
    REFUSED = "the queue was full"
    UNAVAILABLE = "the server could not go on"


@dataclass(frozen=True)
class Ended:
    how: End
    seconds: float
    started: bool
    text: str = ""
    retry_hint: bool = False


@dataclass(frozen=True)
class Ask:
    """A greedy request of exactly so many tokens.

    Attributes:
        timeout: the client's deadline, which it tells the server.
        leave: seconds after which the client goes away.
    """

    prompt: str = "Once upon a time"
    tokens: int = 16
    timeout: float | None = None
    leave: float | None = None


class Clients:
    """Connections of each kind to one server, in the running loop."""

    def __init__(self, server: ServerProcess) -> None:
        self._channel = grpc.aio.insecure_channel(server.address, options=[("grpc.enable_retries", 0)])
        self.typed = rpc.GenerationServiceStub(self._channel)
        self._triton = triton.InferenceServerClient(server.address)
        base = f"http://{server.http_address}/v1"
        self._openai = openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0, timeout=HANG_SECONDS)
        self.kinds = (self._ask_typed, self._ask_triton, self._ask_openai)

    async def __aenter__(self) -> Clients:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        await self._channel.close()
        await self._triton.close()
        await self._openai.close()

    async def ask(self, ask: Ask, kind: int | None = None) -> Ended:
        """One request over protocol `kind`, any by default. Raises what is no end that a request may have."""
        run = random.choice(self.kinds) if kind is None else self.kinds[kind % len(self.kinds)]
        began, seen = asyncio.get_running_loop().time(), _Seen()

        def ended(how: End, hint: bool = False) -> Ended:
            seconds = asyncio.get_running_loop().time() - began
            return Ended(how, seconds, seen.started, "".join(seen.texts), hint)

        leaving = asyncio.timeout(ask.leave)
        try:
            async with asyncio.timeout(HANG_SECONDS), leaving:
                await run(ask, seen)
        except TimeoutError:
            assert leaving.expired(), f"a hang after {len(seen.texts)} pieces of {ask}"
            return ended(End.LEFT)
        except _Failed as failed:
            return ended(failed.how, failed.hint)
        return ended(End.DONE)

    async def _ask_typed(self, ask: Ask, seen: _Seen) -> None:
        sampling = pb.SamplingParameters(max_tokens=ask.tokens, temperature=0, ignore_eos=True)
        call = self.typed.Generate(pb.GenerateRequest(prompt=ask.prompt, sampling=sampling), timeout=ask.timeout)
        finished: pb.Finished | None = None
        try:
            async for event in call:
                assert finished is None, f"{event} came behind the end"
                seen.started = True
                if event.HasField("delta"):
                    seen.texts.append(event.delta.text)
                elif event.HasField("finished"):
                    finished = event.finished
        except grpc.aio.AioRpcError as error:
            hints = {key for key, _ in error.trailing_metadata() or ()}
            raise _Failed(_of_status(error.code().name, error), "retry-after-ms" in hints) from error
        finally:
            call.cancel()
        assert finished is not None, "the stream ended without an end"
        if finished.reason == pb.FINISH_REASON_DEADLINE:
            raise _Failed(End.DEADLINE)
        assert finished.reason == pb.FINISH_REASON_LENGTH, finished
        assert finished.usage.completion_tokens == ask.tokens

    async def _ask_triton(self, ask: Ask, seen: _Seen) -> None:
        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": MODEL, "inputs": vllm_inputs(ask.prompt, max_tokens=ask.tokens, ignore_eos=True)}

        stream = self._triton.stream_infer(requests(), stream_timeout=ask.timeout)
        final = False
        try:
            async for result, error in stream:
                if error is not None:
                    raise error
                assert not final, "a response came behind the final one"
                seen.started = True
                seen.texts.append(result.as_numpy("text_output")[0].decode())
                final = result.get_response().parameters["triton_final_response"].bool_param
        except (InferenceServerException, grpc.aio.AioRpcError) as error:
            raise _Failed(_of_words(error), True) from error
        finally:
            stream.cancel()
        assert final, "the stream ended without an end"

    async def _ask_openai(self, ask: Ask, seen: _Seen) -> None:
        """A deadline is not the protocol's: the client goes away at it."""
        extra = {"ignore_eos": True}
        reason = None
        try:
            async with asyncio.timeout(ask.timeout):
                stream = await self._openai.completions.create(
                    model=MODEL, prompt=ask.prompt, max_tokens=ask.tokens, temperature=0, stream=True, extra_body=extra
                )
                async with stream:
                    async for chunk in stream:
                        assert reason is None, "a chunk came behind the end"
                        seen.started = True
                        seen.texts.append(chunk.choices[0].text)
                        reason = chunk.choices[0].finish_reason
        except TimeoutError:
            raise _Failed(End.LEFT) from None
        except openai.APIStatusError as error:
            names = {429: "RESOURCE_EXHAUSTED", 503: "UNAVAILABLE"}
            hint = "retry-after" in error.response.headers
            raise _Failed(_of_status(names.get(error.status_code, ""), error), hint) from error
        except openai.APIError as error:  # in the stream, or the connection is gone
            raise _Failed(_of_words(error)) from error
        assert reason == "length", reason


@dataclass
class _Seen:
    started: bool = False
    texts: list[str] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.texts = []


class _Failed(Exception):
    def __init__(self, how: End, hint: bool = False) -> None:
        self.how = how
        self.hint = hint


def _of_status(name: str, error: Exception) -> End:
    ends = {
        "RESOURCE_EXHAUSTED": End.REFUSED,
        "UNAVAILABLE": End.UNAVAILABLE,
        "DEADLINE_EXCEEDED": End.DEADLINE,
    }
    if name not in ends:
        raise AssertionError(f"no request may end so: {error!r}") from error
    return ends[name]


def _of_words(error: Exception) -> End:
    """Of an error that came within a stream, where there is no status."""
    text = str(error)
    for words, end in (
        ("queue is full", End.REFUSED),
        ("deadline", End.DEADLINE),
        ("Deadline", End.DEADLINE),
        ("retry", End.UNAVAILABLE),
        ("UNAVAILABLE", End.UNAVAILABLE),
        # grpc.aio's own words where a stream was refused before the client had sent its request; the status is lost.
        ("execute_batch", End.UNAVAILABLE),
        ("Connection", End.UNAVAILABLE),
        ("connection", End.UNAVAILABLE),
    ):
        if words in text:
            return end
    raise AssertionError(f"no request may end so: {error!r}") from error


def vllm_inputs(prompt: str, **sampling: object) -> list[Any]:
    def tensor(name: str, datatype: str, value: object) -> Any:
        made = triton.InferInput(name, [1], datatype)
        made.set_data_from_numpy(np.array([value], dtype=object if datatype == "BYTES" else bool))
        return made

    parameters = json.dumps({"temperature": 0, **sampling})
    return [
        tensor("text_input", "BYTES", prompt.encode()),
        tensor("stream", "BOOL", True),
        tensor("sampling_parameters", "BYTES", parameters.encode()),
        tensor("exclude_input_in_output", "BOOL", True),
    ]
