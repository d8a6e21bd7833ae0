"""The served model as protocol adapters see it: `service.host.Host` over an engine, once there is one.

The server moves it through its phases; adapters only look. What needs the model is refused with UNAVAILABLE in every
phase but READY, except that requests which were accepted before go on while draining.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from engine import Done, Engine, EngineInfo, EngineStats
from service.errors import Code, ServiceError, invalid
from service.generation import GenerationEvent, GenerationRequest, Generator
from service.host import Loras, Phase, Status
from service.observer import Observer, Unobserved
from service.text.chat import Conversation
from service.text.tokenizer import TextModel

LIVE_SECONDS = 30.0  # without a heart beat; a step of the largest prefill on a slow CPU takes less
LOADING_SECONDS = 180.0  # without progress; compiling kernels or reading one large tensor over a network takes less


class ServedModel:
    """One model under one name and its aliases. Belongs to one event loop.

    Attributes:
        observer: is told of every request.
        in_flight: accepted requests that have not ended; `idle` is set while there are none.
    """

    def __init__(self, name: str, aliases: tuple[str, ...] = (), loras: Loras | None = None) -> None:
        self.model_name = name
        self.model_aliases = aliases
        self.loras = loras
        self.observer: Observer = Unobserved()
        self.started_at = time.time()
        self.in_flight = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self._began = self._last_progress = time.monotonic()
        self._status = Status(Phase.LOADING, "start")
        self._changed = asyncio.Event()
        self._engine: Engine | None = None
        self._text: TextModel | None = None
        self._generator: Generator | None = None

    # -- moved by the server -----------------------------------------------------------------------------------

    def loading(self, phase: str, done: Done) -> None:
        """Progress of the load; also proof of life. The time left is guessed from the time passed."""
        self._last_progress = time.monotonic()
        passed, fraction = self._last_progress - self._began, done.fraction
        eta = passed * (1 - fraction) / fraction if 0.05 < fraction <= 1 else None
        self._move(Status(Phase.LOADING, phase, fraction, eta))

    def ready(self, engine: Engine, text: TextModel) -> None:
        self._engine, self._text = engine, text
        self._generator = Generator(engine, text)
        self._move(Status(Phase.READY, progress=1.0))

    def draining(self) -> None:
        self._move(Status(Phase.DRAINING, progress=1.0))

    def failed(self, reason: str) -> None:
        self._move(Status(Phase.FAILED, reason))

    def _move(self, status: Status) -> None:
        self._status = status
        self._changed.set()
        self._changed = asyncio.Event()

    # -- seen by adapters --------------------------------------------------------------------------------------

    @property
    def status(self) -> Status:
        return self._status

    @property
    def alive(self) -> bool:
        if self._status.phase is Phase.FAILED:
            return False
        if self._engine is None:
            return time.monotonic() - self._last_progress < LOADING_SECONDS
        return self._engine.failure is None and self._engine.heartbeat_age < LIVE_SECONDS

    @property
    def stats(self) -> EngineStats:
        return EngineStats() if self._engine is None else self._engine.stats

    @property
    def info(self) -> EngineInfo:
        if self._engine is None:
            raise self._unavailable()
        return self._engine.info

    @property
    def has_chat(self) -> bool:
        return self._text is not None and self._text.chat is not None

    async def watch(self, interval: float) -> AsyncGenerator[Status]:
        """See `service.host.Host.watch`."""
        while True:
            changed = self._changed
            yield self._status
            try:
                await asyncio.wait_for(changed.wait(), interval)
            except TimeoutError:
                continue

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent]:
        """See `service.generation.Generator.generate`. The observer learns of all that happens."""
        observation = self.observer.begin(request)
        try:
            async with aclosing(self._generate(request)) as events:
                async for event in events:
                    observation.event(event)
                    yield event
        except Exception as error:
            observation.failed(error)
            raise
        finally:
            observation.close()

    async def _generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent]:
        if self._generator is None or self._status.phase is not Phase.READY:
            raise self._unavailable()
        self.in_flight += 1
        self.idle.clear()
        try:
            async with aclosing(self._generator.generate(request)) as events:
                async for event in events:
                    yield event
        finally:
            self.in_flight -= 1
            if self.in_flight == 0:
                self.idle.set()

    async def tokenize(self, prompt: str | Conversation, *, add_bos: bool = False) -> list[int]:
        if self._generator is None:
            raise self._unavailable()
        return await self._generator.encode(prompt, add_bos=add_bos)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        tokenizer, limit = self._loaded().tokenizer, self.info.max_model_len
        if len(token_ids) > limit:
            raise invalid("token_ids", f"{len(token_ids)} tokens must be at most the context of {limit}")
        for index, token in enumerate(token_ids):
            if not 0 <= token < tokenizer.vocab_size:
                raise invalid(f"token_ids[{index}]", f"{token} must be between 0 and {tokenizer.vocab_size - 1}")
        return tokenizer.decode(token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """See `service.host.Host.token_bytes`. Ids that pad the embedding matrix have none."""
        tokenizer = self._loaded().tokenizer
        return tokenizer.token_bytes(token_id) if token_id < tokenizer.vocab_size else b""

    def _loaded(self) -> TextModel:
        if self._text is None:
            raise self._unavailable()
        return self._text

    def _unavailable(self) -> ServiceError:
        reasons = {
            Phase.LOADING: f"model {self.model_name} is loading ({self._status.progress:.0%}); retry later",
            Phase.DRAINING: "the server is shutting down; retry with another replica",
            Phase.FAILED: "the engine is down; retry later",
        }
        return ServiceError(Code.UNAVAILABLE, reasons.get(self._status.phase, "the model is not loaded"))
