"""The one face of an engine, whether its core runs in this process (`engine.local`) or in its own (`engine.remote`)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import NamedTuple, Protocol

from engine.request import AdapterInfo, EngineInfo, EngineStats, Request, TokenEvent, Vocabulary


class Done(NamedTuple):
    """How much of a load is done.

    Attributes:
        fraction: of the whole load, 0 to 1; never goes back.
        read, total: bytes of the model's weights in its files that have been read, and all of them; total is 0 before
            the files have been looked at.
    """

    fraction: float
    read: int = 0
    total: int = 0


LoadProgress = Callable[[str, Done], None]
"""Called while loading with the phase in a word ("read weights", "warm up") and how much is done."""


class Engine(Protocol):
    """Asynchronous engine: requests in, TokenEvents out. All methods belong to one event loop."""

    @property
    def info(self) -> EngineInfo:
        """Facts of the loaded model and the sizes that were chosen."""

    @property
    def stats(self) -> EngineStats:
        """Load after the latest step."""

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the core last showed life; it beats at least once a second, idle or not."""

    @property
    def failure(self) -> str | None:
        """Why the engine is dead, or None while it lives."""

    def generate(self, request: Request, ended: Callable[[], None] = lambda: None) -> AsyncGenerator[TokenEvent]:
        """Submit a request and yield its events, the last one with a finish_reason.

        Closing or cancelling the iterator early cancels the request: its pages are free at the next step.

        Args:
            ended: called once when the engine is done with the request, whether or not its events have been read; not
                called for one that is cancelled, or that the engine's death ends.

        Raises:
            InvalidRequestError: before anything is computed, and before the first event.
            AdapterNotFoundError: likewise, if there is no adapter of the name that it asks for.
            EngineDeadError: the engine died before the request ended.
        """

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Say what the tokens mean, once: without it no request with a grammar is served. Never waits."""

    @property
    def adapters(self) -> tuple[AdapterInfo, ...]:
        """The loaded LoRA adapters, by name."""

    async def load_adapter(self, name: str, path: str) -> AdapterInfo:
        """Read a LoRA adapter from its folder beside the work that goes on. Requests find it as soon as this returns.

        One that had the name before serves the requests that have it to their ends. Cancelling this does not stop it.

        Raises:
            CheckpointError: it is missing, broken, or does not fit the model and the rank limit.
            AdapterLimitError: the number of adapters or the memory of the host is at its limit.
            EngineConfigError: the engine was started without slots for adapters.
            EngineDeadError: the engine died.
        """

    def unload_adapter(self, name: str) -> None:
        """New requests do not find it from now on; those that were accepted end with it, and then its memory is free.

        Raises:
            AdapterNotFoundError: there is none of this name.
            EngineDeadError: the engine died.
        """

    async def close(self) -> None:
        """Cancel what runs, stop the core and wait for its end. Idempotent."""

    async def kill(self, reason: str) -> None:
        """End a core that may not be listening any more; what runs gets EngineDeadError with the reason at once."""
