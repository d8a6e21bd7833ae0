"""An engine that computes nothing, and its text side: what is measured with them is the service alone.

    Submit ──► next step ──► StepOutput ──► mailboxes ──► readers        a step: one token for every request that runs
                  ▲                                          │
                  └──── at once, when each has come back ◄───┘           or, with a pace, when its time has come

Every token says when it was made: id 12345 is the text "12345", in ten-microsecond ticks of the monotonic clock, which
all processes of a machine share. So whoever receives it knows how long it was on its way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from engine import EngineInfo, EngineStats, FinishReason, Request, Timings, TokenEvent
from engine.loop import Cancel, Command, StepOutput, Submit
from engine.mailbox import MailboxEngine
from service.text.tokenizer import TextModel

TICKS_PER_SECOND = 100_000
DIGITS = 5  # of a token: about the length of a token of English text
TOKENS = 100_000  # as many as there are: after a second they begin anew
INFO = EngineInfo(
    vocab_size=TOKENS,
    max_model_len=131_072,
    max_batch_size=1024,
    max_batch_tokens=8192,
    page_size=16,
    kv_pages=2**20,
    dtype="bfloat16",
    device="cpu",
    architecture="none",
    num_parameters=0,
    weight_bytes=0,
    load_seconds=0.0,
)


def stamp(seconds: float) -> int:
    """The token that is made at this time."""
    return int(seconds * TICKS_PER_SECOND) % TOKENS


def age(token: int, seconds: float) -> float:
    """Seconds from the token's making to this time, if they are less than one."""
    return ((seconds * TICKS_PER_SECOND - token) % TOKENS) / TICKS_PER_SECOND


class InstantEngine(MailboxEngine):
    """See `engine.face.Engine`. A step waits for the readers of the one before.

    Args:
        pace: seconds between two steps; 0: the next one follows as soon as every reader has come back.
    """

    def __init__(self, pace: float = 0.0) -> None:
        super().__init__(INFO)
        self._pace = pace
        self._left: dict[str, Request] = {}  # that run, by the engine's number
        self._made: dict[str, int] = {}
        self._reading = 0  # readers that have an event of the last step and have not come back
        self._wake = asyncio.Event()
        self._stepping = asyncio.create_task(self._step_for_ever(), name="instant-engine")

    async def generate(self, request: Request, ended: Callable[[], None] = lambda: None) -> AsyncGenerator[TokenEvent]:
        has = False
        try:
            async with aclosing(super().generate(request, ended)) as events:
                async for event in events:
                    has = True
                    yield event
                    has = False
                    self._back()
        finally:
            if has:
                self._back()

    def _back(self) -> None:
        self._reading -= 1
        if self._reading <= 0:
            self._wake.set()

    def _send(self, command: Command) -> None:
        if isinstance(command, Submit):
            self._left[command.request.request_id] = command.request
            self._made[command.request.request_id] = 0
            if self._pace or self._reading <= 0:
                self._wake.set()
        elif isinstance(command, Cancel):
            self._left.pop(command.request_id, None)
            self._made.pop(command.request_id, None)
            self._wake.set()  # whoever is gone comes back no more: the next step waits for nobody

    async def _step_for_ever(self) -> None:
        due = time.monotonic()
        while True:
            await self._wake.wait()
            if self._pace:
                now = time.monotonic()
                due = max(due + self._pace, now)  # after a pause the pace begins anew
                await asyncio.sleep(due - now)
            else:
                self._wake.clear()
            self._deliver(self._step())
            if self._pace and not self._left:
                self._wake.clear()

    def _step(self) -> StepOutput:
        now = time.monotonic()
        token = stamp(now)
        events = []
        for number, request in list(self._left.items()):
            made = self._made[number] = self._made[number] + 1
            last = made == request.sampling.max_tokens
            events.append(
                TokenEvent(
                    request_id=number,
                    token_ids=[token],
                    finish_reason=FinishReason.LENGTH if last else None,
                    prompt_tokens=len(request.prompt_token_ids),
                    timings=Timings(queued=0.0, first_token=0.0, finished=0.0) if made == 1 or last else None,
                )
            )
            if last:
                del self._left[number], self._made[number]
        self._reading = len(events)
        stats = EngineStats(
            running=len(self._left), max_batch_size=self._info.max_batch_size, kv_pages_total=self._info.kv_pages
        )
        return StepOutput(events, stats)

    @property
    def heartbeat_age(self) -> float:
        return 0.0

    async def close(self) -> None:
        self._stepping.cancel()
        self._die("the engine was closed")

    async def kill(self, reason: str) -> None:
        self._die(reason)
        await self.close()


class Digits:
    """See `service.text.tokenizer.Tokenizer`: each id is its number as text."""

    vocab_size = INFO.vocab_size
    bos_id = None
    eos_id = None

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        return [ord(each) % self.vocab_size for each in text]

    def control_id(self, name: str) -> int | None:
        return None

    def token_bytes(self, token_id: int) -> bytes:
        return _TOKENS[token_id]

    def token_name(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode()

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, token_ids)).decode()


_TOKENS = [b"%0*d" % (DIGITS, token) for token in range(INFO.vocab_size)]


def digits() -> TextModel:
    """The text side."""
    return TextModel(Digits(), chat=None)
