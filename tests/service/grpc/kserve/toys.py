"""Small models that run through the real servicer. Each has a twin of the same behaviour for the Python backend of a
real Triton in tests/triton_diff, which compares the two servers.

    sums      INT32 [16] a, b -> INT32 [16] sum, difference; batches of up to 8
    echo      BYTES [-1] text -> BYTES [-1] text
    optional  INT32 [1] must, may (optional) -> INT32 [1] sum
    failing   INT32 [1] code -> an error of that code
    repeat    decoupled: INT32 [1] count, BOOL [1] tell (optional), INT32 [1] fail_at (optional) -> INT32 [1] each of
              0, 1, …; the last is marked final only if tell is true; an error takes the place of number fail_at
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import numpy as np

from service.errors import Code, ServiceError
from service.grpc.kserve.model import READY, InferRequest, InferResult, ModelSpec, TensorSpec

INT16 = (16,)
ONE = (1,)
CODES = (Code.INTERNAL, Code.NOT_FOUND, Code.INVALID_ARGUMENT, Code.UNAVAILABLE, Code.UNIMPLEMENTED)


class Toy:
    """A model without state of its own."""

    spec: ModelSpec
    state = (READY, "")
    accepts = True


class Sums(Toy):
    spec = ModelSpec(
        name="sums",
        inputs=(TensorSpec("a", "INT32", INT16), TensorSpec("b", "INT32", INT16)),
        outputs=(TensorSpec("sum", "INT32", INT16), TensorSpec("difference", "INT32", INT16)),
        max_batch_size=8,
        backend="python",
    )

    async def infer(self, request: InferRequest) -> AsyncGenerator[InferResult]:
        a, b = request.inputs["a"], request.inputs["b"]
        yield InferResult(outputs={"sum": a + b, "difference": a - b})


class Echo(Toy):
    spec = ModelSpec(
        name="echo",
        inputs=(TensorSpec("text", "BYTES", (-1,)),),
        outputs=(TensorSpec("text", "BYTES", (-1,)),),
        backend="python",
    )

    async def infer(self, request: InferRequest) -> AsyncGenerator[InferResult]:
        yield InferResult(outputs={"text": request.inputs["text"]})


class Optional(Toy):
    spec = ModelSpec(
        name="optional",
        inputs=(TensorSpec("must", "INT32", ONE), TensorSpec("may", "INT32", ONE, optional=True)),
        outputs=(TensorSpec("sum", "INT32", ONE),),
        backend="python",
    )

    async def infer(self, request: InferRequest) -> AsyncGenerator[InferResult]:
        zero = np.zeros(1, np.int32)
        yield InferResult(outputs={"sum": request.inputs["must"] + request.inputs.get("may", zero)})


class Failing(Toy):
    spec = ModelSpec(
        name="failing",
        inputs=(TensorSpec("code", "INT32", ONE),),
        outputs=(TensorSpec("none", "INT32", ONE),),
        backend="python",
    )

    async def infer(self, request: InferRequest) -> AsyncGenerator[InferResult]:
        number = int(request.inputs["code"][0])
        if number == len(CODES):
            raise ValueError("a bug with a secret in its text")
        raise ServiceError(CODES[number], f"refused for reason {number}")
        yield


class Repeat(Toy):
    spec = ModelSpec(
        name="repeat",
        inputs=(
            TensorSpec("count", "INT32", ONE),
            TensorSpec("tell", "BOOL", ONE, optional=True),
            TensorSpec("fail_at", "INT32", ONE, optional=True),
        ),
        outputs=(TensorSpec("number", "INT32", ONE),),
        decoupled=True,
        backend="python",
    )

    async def infer(self, request: InferRequest) -> AsyncGenerator[InferResult]:
        count, fail_at = int(request.inputs["count"][0]), int(request.inputs.get("fail_at", [-1])[0])
        tell = bool(request.inputs.get("tell", [False])[0])
        for number in range(count):
            if number == fail_at:
                raise ServiceError(Code.INTERNAL, f"broke at {number}")
            final = tell and number == count - 1
            yield InferResult(outputs={"number": np.array([number], np.int32)}, final=final)


class Firehose(Toy):
    """Decoupled: `count` messages of `size` bytes, as fast as they are taken. Not for the comparison."""

    spec = ModelSpec(
        name="firehose",
        inputs=(TensorSpec("count", "INT32", ONE), TensorSpec("size", "INT32", ONE)),
        outputs=(TensorSpec("water", "BYTES", ONE),),
        decoupled=True,
    )

    def __init__(self) -> None:
        self.produced = 0
        self.stopped = asyncio.Event()

    async def infer(self, request: InferRequest) -> AsyncGenerator[InferResult]:
        count, size = (int(request.inputs[name][0]) for name in ("count", "size"))
        try:
            for number in range(count):
                self.produced += 1
                yield InferResult(outputs={"water": np.array([b"w" * size], object)}, final=number == count - 1)
                await asyncio.sleep(0)  # as a real model, let others run
        finally:
            self.stopped.set()


def comparable() -> list[Toy]:
    """Those that have a twin."""
    return [Sums(), Echo(), Optional(), Failing(), Repeat()]
