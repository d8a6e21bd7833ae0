"""What protocol adapters see of the running server: the served model, its phase, its generator, its load."""

from __future__ import annotations

import enum
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine import AdapterInfo, EngineInfo, EngineStats
from service.admission import AdmissionStats
from service.errors import ServiceError
from service.generation import GenerationEvent, GenerationRequest
from service.text.chat import Conversation


class Phase(enum.StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    UNLOADED = "unloaded"


class Cause(enum.StrEnum):
    """Why an engine was started again."""

    DIED = "died"
    HUNG = "hung"
    NOT_STARTED = "not_started"


@dataclass(frozen=True, slots=True)
class Status:
    """Where the server is in its life. `detail` says what is being loaded, or why it failed. `progress` is 0 to 1;
    `eta_seconds` is None when nothing says how long."""

    phase: Phase
    detail: str = ""
    progress: float = 0.0
    eta_seconds: float | None = None


class Loras(Protocol):
    """LoRA adapters of the served model, which come and go; each answers to a name of its own."""

    @property
    def loaded(self) -> Mapping[str, AdapterInfo]:
        """By name; none before the model is ready."""

    @property
    def absent(self) -> Mapping[str, str]:
        """Those that are known but not loaded, by name, and why."""

    async def load(self, name: str) -> None:
        """Load one that the server has, or load it again.

        Raises:
            ServiceError: INVALID_ARGUMENT, it is no name; NOT_FOUND, there is none; FAILED_PRECONDITION, it is broken
                or does not fit the model and the limits; RESOURCE_EXHAUSTED, too many are loaded; UNAVAILABLE.
        """

    async def unload(self, name: str) -> None:
        """New requests do not find it any more, nor those that wait; those that the engine has end with it.

        Raises:
            ServiceError: NOT_FOUND, UNAVAILABLE.
        """


class ModelControl(Protocol):
    """Changes of the served model itself while the server runs. Requests that run end on the model that they began on;
    those that come while another is loaded wait for it."""

    async def load(self, model: str | None) -> None:
        """Load the model again from its source as it is now, or another one of the store in its place. When that fails
        the one before is served on.

        Args:
            model: a name of the catalogue, or of a folder in the model store; None: the one that is served.

        Raises:
            ServiceError: INVALID_ARGUMENT, it is no such name; NOT_FOUND, it is not in the store; FAILED_PRECONDITION,
                it cannot be loaded; UNAVAILABLE.
        """

    async def unload(self) -> None:
        """Let requests end, then free the engine's memory. New ones are refused until the next `load`.

        Raises:
            ServiceError: UNAVAILABLE.
        """


class Host(Protocol):
    """One served model under one name and its aliases.

    Everything that needs the model raises ServiceError(UNAVAILABLE) while loading, draining or failed.
    """

    @property
    def model_name(self) -> str: ...

    @property
    def model_aliases(self) -> tuple[str, ...]: ...

    @property
    def status(self) -> Status: ...

    @property
    def accepting(self) -> bool:
        """New requests are taken: ready, or draining for so short a time that not all who send them have heard of it,
        or another model is being loaded, for which they wait."""

    @property
    def alive(self) -> bool:
        """True while loading makes progress or the engine's heart beats."""

    @property
    def started_at(self) -> float:
        """Unix time of the server's start."""

    @property
    def stats(self) -> EngineStats:
        """The engine's, and what waits for the engine counted with what waits in it."""

    @property
    def queue(self) -> AdmissionStats:
        """What waits for the engine, and what has been refused."""

    @property
    def info(self) -> EngineInfo:
        """Raises ServiceError(UNAVAILABLE) before the model is loaded."""

    @property
    def has_chat(self) -> bool: ...

    @property
    def loras(self) -> Loras | None:
        """None if the server was started without."""

    @property
    def control(self) -> ModelControl | None:
        """None if clients may not change the served model."""

    @property
    def restarts(self) -> Mapping[Cause, int]:
        """How often the engine was started again; none of a cause that has not happened."""

    def watch(self, interval: float) -> AsyncGenerator[Status]:
        """Yield the status now, whenever it changes, and at least every `interval` seconds; ends with the server."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent]:
        """As `service.generation.Generator.generate`, once the request's turn has come.

        After the deadline of a request that has had an event, each of its completions that had not ended ends with
        FinishReason.DEADLINE.

        Raises:
            ServiceError: before the first event also PERMISSION_DENIED, for the priority, and RESOURCE_EXHAUSTED, both
                at once; DEADLINE_EXCEEDED, which also ends a request whose events are not taken; UNAVAILABLE.
        """

    async def tokenize(self, prompt: str | Conversation, *, add_bos: bool = False) -> list[int]:
        """Token ids of a text or of a conversation's whole prompt."""

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids; ServiceError(INVALID_ARGUMENT) for one that is not in the vocabulary."""

    def token_bytes(self, token_id: int) -> bytes:
        """See `service.text.tokenizer.Tokenizer.token_bytes`."""

    def token_name(self, token_id: int) -> str:
        """See `service.text.tokenizer.Tokenizer.token_name`."""

    @property
    def text_ends(self) -> tuple[int | None, int | None]:
        """Ids of the tokens that begin and end a text; None where the model has none or does not expect it."""


def info_of(host: Host) -> EngineInfo | None:
    """None while there is no engine."""
    try:
        return host.info
    except ServiceError:
        return None
