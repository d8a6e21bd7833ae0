"""What the servicer serves: a description of tensors and a function from named arrays to responses.

Nothing here knows protobuf or language models, so that toy models of tests run through the same servicer.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Parameter = bool | int | float | str

READY = "READY"
LOADING = "LOADING"
UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output.

    Attributes:
        datatype: protocol name: BOOL, INT32, FP32, BYTES, …
        dims: without batch dimension; -1 = any.
        instead: a required input may be absent if the request brings the input or parameter of this name.
    """

    name: str
    datatype: str
    dims: tuple[int, ...]
    optional: bool = False
    instead: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What clients can know about a model.

    Attributes:
        max_batch_size: 0 = shapes have no batch dimension.
        decoupled: a request may get any number of responses, so that only ModelStreamInfer serves it in general.
        stream_input: BOOL input of a decoupled model; unless it is true there is exactly one response, and ModelInfer
            serves that too.
        lenient: inputs may come with and without a batch dimension of 1, whatever max_batch_size says.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int = 0
    decoupled: bool = False
    stream_input: str | None = None
    lenient: bool = False
    backend: str = "nemoserve"
    version: str = "1"


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """A validated request. BYTES inputs are object arrays of bytes.

    Attributes:
        parameters: request parameters without the reserved ones.
        priority: 1 = highest; 0 = the model's default.
        timeout: longest wait before the work begins, in seconds; None = no limit.
        deadline: on the clock of time.monotonic(); after it nobody waits for the answer. None = no limit.
        single: there must be exactly one response.
    """

    id: str
    inputs: Mapping[str, Array]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    priority: int = 0
    timeout: float | None = None
    deadline: float | None = None
    single: bool = False


class InferResult(msgspec.Struct, frozen=True, kw_only=True):
    """One response: arrays by output name, as many of the outputs as there is something to say about.

    Attributes:
        final: nothing follows. A model that ends without one has its end told only to clients that ask for it.
        queued_seconds: how long the request waited before the work began, for statistics.
    """

    outputs: Mapping[str, Array]
    final: bool = False
    queued_seconds: float = 0.0


class Model(Protocol):
    """One name in the repository."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def state(self) -> tuple[str, str]:
        """READY, LOADING or UNAVAILABLE, and the reason in words."""

    @property
    def accepts(self) -> bool:
        """Requests are taken now; also by a model that says it is not ready, so that fewer come."""

    def infer(self, request: InferRequest) -> AsyncGenerator[InferResult]:
        """Responses to one request. Closing the generator early cancels the work.

        Raises:
            ServiceError: ends this request and no other.
        """


class Repository(Protocol):
    """Models that come and go while the server runs, beside those that it always has."""

    def find(self, name: str) -> Model | None: ...

    def models(self) -> Sequence[Model]: ...

    def absent(self) -> Mapping[str, str]:
        """Models that are known but not loaded, by name, and why."""

    async def load(self, name: str) -> None:
        """Raises ServiceError."""

    async def unload(self, name: str) -> None:
        """Raises ServiceError."""


class Control(Protocol):
    """Changes of the models that the server always has, which are names of one."""

    async def load(self, model: str | None) -> None:
        """Load it again, or another one in its place. Raises ServiceError."""

    async def unload(self) -> None:
        """Raises ServiceError."""
