"""What protocol adapters see of the running server: the served model, its phase, its generator, its load."""

from __future__ import annotations

import enum
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine import EngineInfo, EngineStats
from service.generation import GenerationEvent, GenerationRequest
from service.text.chat import Conversation


class Phase(enum.StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Status:
    """Where the server is in its life. `progress` is 0 to 1; `eta_seconds` is None when nothing says how long."""

    phase: Phase
    detail: str = ""
    progress: float = 0.0
    eta_seconds: float | None = None


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
    def alive(self) -> bool:
        """True while loading makes progress or the engine's heart beats."""

    @property
    def started_at(self) -> float:
        """Unix time of the server's start."""

    @property
    def stats(self) -> EngineStats: ...

    @property
    def info(self) -> EngineInfo:
        """Raises ServiceError(UNAVAILABLE) before the model is loaded."""

    @property
    def has_chat(self) -> bool: ...

    def watch(self, interval: float) -> AsyncGenerator[Status]:
        """Yield the status now, whenever it changes, and at least every `interval` seconds; ends with the server."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent]:
        """See `service.generation.Generator.generate`."""

    async def tokenize(self, prompt: str | Conversation, *, add_bos: bool = False) -> list[int]:
        """Token ids of a text or of a conversation's whole prompt."""

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids; ServiceError(INVALID_ARGUMENT) for one that is not in the vocabulary."""

    def token_bytes(self, token_id: int) -> bytes:
        """See `service.text.tokenizer.Tokenizer.token_bytes`."""
