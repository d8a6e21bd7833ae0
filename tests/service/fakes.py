"""A `service.host.Host` without an engine: deterministic text, progress that a test holds in its hand.

Answers are the pieces " t0", " t1", …; one token each. A prompt is one token per UTF-8 byte, so that ids below 256 are
bytes of prompts and id 256 + i is piece i. Limits are checked with the engine's own `validate_request`.

    host = FakeHost()
    host.answers["boom"] = Answer(error=ServiceError(Code.INTERNAL, "exploded"), error_after=2)
    host.answers["slow"] = Answer(gate=(gate := Gate()))      # each token waits for gate.allow()
    await host.until(lambda: host.produced["id"] == 3)
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from engine import EngineError, EngineInfo, EngineStats, FinishReason, Request, TokenLogprob
from engine.request import validate_request
from service.admission import AdmissionStats
from service.errors import Code, ServiceError, from_engine, invalid
from service.generation import Delta, Finished, GenerationEvent, GenerationRequest, Started, Usage
from service.host import Cause, Loras, ModelControl, Phase, Status
from service.text.chat import Conversation, ToolCallDelta

PIECES = 1000
FIRST_PIECE = 256
INFO = EngineInfo(
    vocab_size=FIRST_PIECE + PIECES,
    max_model_len=512,
    max_batch_size=8,
    max_batch_tokens=64,
    page_size=64,
    kv_pages=64,
    dtype="float32",
    device="cpu",
    architecture="FakeForCausalLM",
    num_parameters=1234,
    weight_bytes=5678,
    load_seconds=0.5,
)


class Gate:
    """Lets exactly as many tokens pass as were allowed."""

    def __init__(self) -> None:
        self._permits = asyncio.Semaphore(0)

    def allow(self, tokens: int = 1) -> None:
        for _ in range(tokens):
            self._permits.release()

    async def pass_one(self) -> None:
        await self._permits.acquire()


@dataclass
class Answer:
    """How the fake answers one prompt.

    Attributes:
        pieces: texts of the tokens, None = " t0", " t1", …; with fewer pieces than max_tokens the answer ends by STOP.
        calls: pieces of tool calls by the number of the token that brings them instead of text.
        gate: each token waits for it.
        error: raised after `error_after` tokens; with 0 before Started.
        finished_error: the last event is Finished(reason=ERROR, error=this) after `error_after` tokens.
    """

    pieces: tuple[str, ...] | None = None
    calls: dict[int, list[ToolCallDelta]] = field(default_factory=dict)
    gate: Gate | None = None
    error: ServiceError | None = None
    finished_error: str | None = None
    error_after: int = 0


@dataclass
class FakeHost:
    """Attributes record what happened: requests as received, tokens produced by id, ids that were closed early."""

    model_name: str = "fake"
    model_aliases: tuple[str, ...] = ("vllm_model", "ensemble", "tensorrt_llm_bls")
    status: Status = field(default_factory=lambda: Status(Phase.READY))
    alive: bool = True
    started_at: float = 1_700_000_000.0
    stats: EngineStats = field(default_factory=EngineStats)
    queue: AdmissionStats = field(default_factory=AdmissionStats)
    has_chat: bool = True
    loras: Loras | None = None
    control: ModelControl | None = None
    restarts: Counter[Cause] = field(default_factory=Counter)
    answers: dict[str, Answer] = field(default_factory=dict)
    requests: list[GenerationRequest] = field(default_factory=list)
    produced: Counter[str] = field(default_factory=Counter)
    cancelled: list[str] = field(default_factory=list)
    running: int = 0

    def __post_init__(self) -> None:
        self._changed = asyncio.Condition()

    @property
    def accepting(self) -> bool:
        return self.status.phase is Phase.READY

    @property
    def info(self) -> EngineInfo:
        self._check_ready()
        return INFO

    async def set_status(self, status: Status) -> None:
        self.status = status
        await self._notify()

    async def set_stats(self, stats: EngineStats) -> None:
        self.stats = stats
        await self._notify()

    async def until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        """Wait until `condition` holds; it is looked at after every start, token, end and change of status."""
        async with asyncio.timeout(seconds), self._changed:
            await self._changed.wait_for(condition)

    async def watch(self, interval: float) -> AsyncGenerator[Status]:
        while True:
            yield self.status
            async with self._changed:
                try:
                    await asyncio.wait_for(self._changed.wait(), interval)
                except TimeoutError:
                    pass

    async def tokenize(self, prompt: str | Conversation, *, add_bos: bool = False) -> list[int]:
        self._check_ready()
        if isinstance(prompt, Conversation):
            prompt = "".join(f"<{message.role}>{message.content}" for message in prompt.messages)
        return list(prompt.encode())

    def detokenize(self, token_ids: Sequence[int]) -> str:
        self._check_ready()
        try:
            return b"".join(self.token_bytes(token) for token in token_ids).decode(errors="replace")
        except ValueError as error:
            raise invalid("token_ids", str(error)) from error

    def token_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < INFO.vocab_size:
            raise ValueError(f"token id {token_id} is not in the vocabulary")
        return bytes([token_id]) if token_id < FIRST_PIECE else f" t{token_id - FIRST_PIECE}".encode()

    def token_name(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode(errors="replace")

    @property
    def text_ends(self) -> tuple[int | None, int | None]:
        self._check_ready()
        return None, FIRST_PIECE

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent]:
        self._check_ready()
        self.requests.append(request)
        prompt = request.prompt if isinstance(request.prompt, list) else await self.tokenize(request.prompt)
        self._validate(request, prompt)
        answer = self.answers.get(request.prompt if isinstance(request.prompt, str) else "", Answer())
        ended = False
        self.running += 1
        try:
            await self._notify()
            for index in range(request.n):
                async for event in self._answer(index, request, answer, len(prompt)):
                    yield event
            ended = True
        except ServiceError:
            ended = True
            raise
        finally:
            self.running -= 1
            if not ended:
                self.cancelled.append(request.request_id)
            await asyncio.shield(self._notify())

    async def _answer(
        self, index: int, request: GenerationRequest, answer: Answer, prompt_tokens: int
    ) -> AsyncGenerator[GenerationEvent]:
        pieces = answer.pieces if answer.pieces is not None else tuple(f" t{i}" for i in range(PIECES))
        wanted = min(len(pieces), request.sampling.max_tokens)
        started = False
        for i in range(wanted + 1):
            if answer.gate is not None and i < wanted:
                await answer.gate.pass_one()
            if answer.error is not None and i >= answer.error_after:
                raise answer.error
            if not started and index == 0:
                yield Started(
                    request_id=request.request_id, prompt_tokens=prompt_tokens, cached_tokens=0, queue_seconds=0.001
                )
            started = True
            if i == wanted or (answer.finished_error is not None and i >= answer.error_after):
                yield self._finished(index, request, answer, prompt_tokens, i)
                return
            self.produced[request.request_id] += 1
            await self._notify()
            calls = answer.calls.get(i, [])
            yield Delta(
                index=index,
                text="" if calls else pieces[i],
                token_ids=[FIRST_PIECE + i],
                logprobs=self._logprobs(i, request),
                tool_calls=calls,
                last=i + 1 == wanted and answer.error is None,
            )

    def _finished(
        self, index: int, request: GenerationRequest, answer: Answer, prompt_tokens: int, tokens: int
    ) -> Finished:
        reason = FinishReason.LENGTH if tokens == request.sampling.max_tokens else FinishReason.STOP
        if answer.finished_error is not None:
            reason = FinishReason.ERROR
        return Finished(
            index=index,
            reason=reason,
            usage=Usage(prompt_tokens=prompt_tokens, completion_tokens=tokens),
            tool_calls=sum(bool(piece.name) for pieces in answer.calls.values() for piece in pieces),
            error=answer.finished_error,
            queued_seconds=0.001,
            first_token_seconds=0.002,
            finished_seconds=0.003,
        )

    def _logprobs(self, i: int, request: GenerationRequest) -> list[TokenLogprob]:
        """Token i has logprob -(i + 1) / 4 and rank 1, and beside it in `top` the next piece at one less."""
        if request.sampling.logprobs is None:
            return []
        logprob = -(i + 1) / 4
        top = [(FIRST_PIECE + i, logprob), (FIRST_PIECE + i + 1, logprob - 1)][: request.sampling.logprobs]
        return [TokenLogprob(FIRST_PIECE + i, logprob, 1, top)]

    def _validate(self, request: GenerationRequest, prompt: list[int]) -> None:
        engine_request = Request(
            request_id=request.request_id, prompt_token_ids=prompt, sampling=request.sampling, priority=request.priority
        )
        try:
            validate_request(engine_request, INFO)
        except EngineError as error:
            raise from_engine(error) from error

    def _check_ready(self) -> None:
        if self.status.phase is not Phase.READY:
            raise ServiceError(Code.UNAVAILABLE, f"the server is {self.status.phase.value}; retry later")

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
