"""The served model as protocol adapters see it: `service.host.Host` over an engine, once there is one.

The server and its supervisor move it through its phases; adapters only look. What needs the model is refused with
UNAVAILABLE in every phase but READY, except that new requests are taken for the first seconds of draining, until those
who send them have heard of it, and that requests which were accepted before go on to their ends.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from msgspec.structs import replace

from engine import Done, Engine, EngineInfo, EngineStats
from service.admission import Admission, AdmissionStats, Delivery, Flight
from service.errors import Code, EngineLost, ServiceError, invalid
from service.generation import GenerationEvent, GenerationRequest, Generator, Prepared
from service.host import Cause, Loras, ModelControl, Phase, Status
from service.observer import Observer, Unobserved
from service.text.chat import Conversation
from service.text.grammar import vocabulary
from service.text.tokenizer import TextModel

# Without a heart beat, of which every step gives one. A step of a GPU takes well below a second; kernels that are
# compiled when they are first met take half a minute. A step of 512 prompt tokens of a 12B model is 12.5 TFLOP: four
# minutes of a CPU that does 50 GFLOP/s.
GPU_BEAT_SECONDS, CPU_BEAT_SECONDS = 60.0, 300.0
LOADING_SECONDS = 180.0  # without progress; compiling kernels or reading one large tensor over a network takes less

CUT_OFF = "the server shut down before the request could end; retry with another replica"


class ServedModel:
    """One model under one name and its aliases. Belongs to one event loop.

    Args:
        engine_timeout: seconds without a heart beat after which the engine counts as hung; None: what its device takes.

    Attributes:
        observer: is told of every request.
        admission: the queue that every request passes; by default with the limits that a server has by default.
        control: loads and unloads the model itself; None if clients may not.
        restarts: how often the engine was started again, by cause.
    """

    def __init__(
        self,
        name: str,
        aliases: tuple[str, ...] = (),
        loras: Loras | None = None,
        engine_timeout: float | None = None,
        admission: Admission | None = None,
    ) -> None:
        self.model_name = name
        self.model_aliases = aliases
        self.loras = loras
        self.observer: Observer = Unobserved()
        self.control: ModelControl | None = None
        self.restarts: Counter[Cause] = Counter()
        self.started_at = time.time()
        self.admission = admission or Admission()
        self._engine_timeout = engine_timeout
        self._taking = True  # new requests, if there is a model to answer them
        self._serving = False  # requests that come now are answered by the model that there is
        self._held: asyncio.Event | None = None  # set when those that wait for a model may look again
        self._began = self._last_progress = time.monotonic()
        self._status = Status(Phase.LOADING, "start")
        self._changed = asyncio.Event()
        self._engine: Engine | None = None
        self._text: TextModel | None = None
        self._generator: Generator | None = None

    # -- moved by the server and the supervisor ----------------------------------------------------------------

    def begin(self, phase: str) -> None:
        """A load begins, the first or a later one: there is no engine now. A text side that is loaded stays."""
        self._gone()
        self._engine = None
        self._began = time.monotonic()
        self.loading(phase, Done(0.0))

    def loading(self, phase: str, done: Done) -> None:
        """Progress of the load; also proof of life. The time left is guessed from the time passed."""
        self._last_progress = time.monotonic()
        passed, fraction = self._last_progress - self._began, done.fraction
        eta = passed * (1 - fraction) / fraction if 0.05 < fraction <= 1 else None
        self._move(Status(Phase.LOADING, phase, fraction, eta))

    def ready(self, engine: Engine, text: TextModel) -> None:
        engine.set_vocabulary(vocabulary(text.tokenizer))
        self._engine, self._text = engine, text
        self._generator, self._serving = Generator(engine, text), True
        self.admission.open(engine)
        self._release()
        self._move(Status(Phase.READY, progress=1.0))

    def hung(self) -> None:
        """The engine does not answer: neither ready nor alive, until the next load begins."""
        if self._status.phase is not Phase.DRAINING:
            self._move(Status(Phase.FAILED, "the engine does not answer"))

    def hold(self, *, takes: bool) -> None:
        """The model is about to be exchanged or, unless `takes`, unloaded.

        Args:
            takes: new requests, and those that wait, get the next model; else new ones are refused, and the engine gets
                those that wait before it ends.
        """
        self._serving = False
        if takes:
            self._held = asyncio.Event()
            self.admission.close()
        self._move(Status(Phase.LOADING, "wait for running requests") if takes else Status(Phase.UNLOADED, "unloading"))

    def _gone(self) -> None:
        """There is no engine for anybody."""
        self._generator, self._serving = None, False
        self.admission.close()

    def _release(self) -> None:
        if self._held is not None:
            self._held.set()
            self._held = None

    def unloaded(self) -> None:
        self._gone()
        self._engine = self._text = None
        self._release()
        self._move(Status(Phase.UNLOADED, "unloaded"))
        self.admission.fail(self._unavailable())  # the engine died before it was handed those that wait

    def draining(self) -> None:
        """Not ready any more, but new requests are still taken."""
        self._move(Status(Phase.DRAINING, progress=1.0))

    def refuse(self) -> None:
        """From now on new requests are refused."""
        self._taking = False

    def cut_off(self) -> None:
        """Requests that wait are refused too; those that run end with the engine."""
        self.refuse()
        self._gone()
        self.admission.fail(self._unavailable())
        self._release()

    def failed(self, reason: str) -> None:
        self._gone()
        self._release()
        self._move(Status(Phase.FAILED, reason))
        self.admission.fail(self._unavailable())

    def _move(self, status: Status) -> None:
        if self._status.phase is Phase.DRAINING and status.phase is not Phase.FAILED:
            return  # there is no way back, whatever becomes of the engine
        self._status = status
        self._changed.set()
        self._changed = asyncio.Event()

    # -- seen by adapters --------------------------------------------------------------------------------------

    @property
    def status(self) -> Status:
        return self._status

    @property
    def accepting(self) -> bool:
        return self._taking and (self._serving or self._held is not None)

    @property
    def alive(self) -> bool:
        if self._status.phase is Phase.FAILED:
            return False
        if self._engine is None:
            return self._status.phase is Phase.UNLOADED or time.monotonic() - self._last_progress < LOADING_SECONDS
        return not self.silent

    @property
    def silent(self) -> bool:
        """The engine has not shown life for longer than a step can take."""
        if self._engine is None:
            return False
        own = GPU_BEAT_SECONDS if self._engine.info.device.startswith("cuda") else CPU_BEAT_SECONDS
        return self._engine.heartbeat_age > (own if self._engine_timeout is None else self._engine_timeout)

    @property
    def stats(self) -> EngineStats:
        """See `service.host.Host.stats`."""
        engine, queue = EngineStats() if self._engine is None else self._engine.stats, self.admission.stats
        return replace(
            engine,
            queued=engine.queued + queue.queued,
            queued_tokens=engine.queued_tokens + queue.queued_tokens,
            oldest_queued_seconds=max(engine.oldest_queued_seconds, queue.oldest_queued_seconds),
        )

    @property
    def queue(self) -> AdmissionStats:
        """See `service.host.Host.queue`."""
        return self.admission.stats

    @property
    def in_flight(self) -> int:
        """Accepted requests that have not ended; `idle` is set while there are none."""
        return self.admission.in_flight

    @property
    def idle(self) -> asyncio.Event:
        return self.admission.idle

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
        """See `service.host.Host.generate`. The observer learns of all that happens."""
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
        if not self.accepting:
            raise self._unavailable()
        flight, delivery = self.admission.enter(request), None
        try:
            text, prepared = await self._prepare(request)
            most = self.info.max_model_len if request.until_context else request.sampling.max_tokens
            may_block = prepared.request.sampling.grammar is not None or request.adapter is not None
            await self.admission.join(flight, len(prepared.prompt), most, may_block=may_block)
            while True:
                try:
                    if text is not self._text:  # another model was loaded while it waited
                        text, prepared = await self._prepare(request)
                    delivery = self._deliver(flight, prepared)
                    while (event := await delivery.next()) is not None:
                        if not flight.started:
                            self.admission.began(flight)
                        yield event
                    return
                except EngineLost:
                    if flight.started or flight.returned:
                        raise
                if delivery is not None:
                    await delivery.close()
                await self.admission.join_again(flight)
        except ServiceError as error:
            if error.code is Code.UNAVAILABLE and not self._taking:
                raise ServiceError(Code.UNAVAILABLE, CUT_OFF) from error
            raise
        finally:
            if delivery is not None:
                await delivery.close()
            self.admission.leave(flight, delivery)

    async def _prepare(self, request: GenerationRequest) -> tuple[TextModel | None, Prepared]:
        """What the engine gets when the request's turn comes, and whose token ids that is.

        Raises:
            ServiceError: something is wrong with it, or the deadline comes first.
        """
        try:
            async with asyncio.timeout_at(request.deadline):
                while self._held is not None:
                    await self._held.wait()
                if self._generator is None:
                    raise self._unavailable()
                return self._text, await self._generator.prepare(request)
        except TimeoutError:
            raise ServiceError(Code.DEADLINE_EXCEEDED, "the deadline passed before the prompt was read") from None

    def _deliver(self, flight: Flight, prepared: Prepared) -> Delivery:
        """Hand a request to the engine whose turn it is; EngineLost if there is none any more."""
        if self._generator is None:
            raise EngineLost
        completed = functools.partial(self.admission.completed, flight)
        events = self._generator.run(prepared, waited=flight.waited, ended=completed)
        delivery = Delivery(events, flight.slots, flight.deadline, self.admission.limits.slow_reader_seconds)
        delivery.cut = lambda: self.admission.leave(flight, delivery)
        return delivery

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

    def token_name(self, token_id: int) -> str:
        """See `service.host.Host.token_name`."""
        tokenizer = self._loaded().tokenizer
        return tokenizer.token_name(token_id) if token_id < tokenizer.vocab_size else f"<padding {token_id}>"

    @property
    def text_ends(self) -> tuple[int | None, int | None]:
        """See `service.host.Host.text_ends`."""
        tokenizer = self._loaded().tokenizer
        return tokenizer.bos_id, tokenizer.eos_id

    def _loaded(self) -> TextModel:
        if self._text is None:
            raise self._unavailable()
        return self._text

    def _unavailable(self) -> ServiceError:
        reasons = {
            Phase.LOADING: f"model {self.model_name} is loading ({self._status.progress:.0%}); retry later",
            Phase.DRAINING: "the server is shutting down; retry with another replica",
            Phase.FAILED: "the engine is down; retry later",
            Phase.UNLOADED: f"model {self.model_name} is unloaded; an administrator can load it",
        }
        return ServiceError(Code.UNAVAILABLE, reasons.get(self._status.phase, "the model is not loaded"))
