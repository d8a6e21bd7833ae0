"""The core: schedule, run, sample, commit, emit. It owns all engine state and belongs to one thread.

add, cancel ─► Scheduler ──StepPlan──► runner ──StepResult──► Scheduler ─► TokenEvents
"""

from __future__ import annotations

import math
import random
import secrets
import time
from collections.abc import Callable
from typing import Protocol

from engine.config import EngineConfig
from engine.kv.pages import PagePool
from engine.request import EngineInfo, EngineStats, Request, TokenEvent, validate_request
from engine.scheduler import Scheduler
from engine.step import StepPlan, StepResult

RATE_SECONDS = 5.0  # of work, over which tokens per second are averaged


class StepRunner(Protocol):
    """What the core needs of `engine.runner.Runner`."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    def run(self, plan: StepPlan) -> StepResult: ...


class EngineCore:
    """Requests in, TokenEvents out, one `step` at a time."""

    def __init__(self, runner: StepRunner, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
        info = runner.info
        self.info = info
        self._runner = runner
        self._clock = clock
        self._pool = PagePool(info.kv_pages)
        self._scheduler = Scheduler(
            self._pool,
            page_size=info.page_size,
            max_batch_size=info.max_batch_size,
            max_batch_tokens=info.max_batch_tokens,
            max_model_len=info.max_model_len,
            eos_token_ids=runner.eos_token_ids,
        )
        self._seeds = random.Random(config.seed if config.seed is not None else secrets.randbits(64))
        self._steps = 0
        self._prefill_rate = Rate()
        self._decode_rate = Rate()

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: names the field, the value and the limit.
        """
        validate_request(request, self.info)
        seed = self._seeds.getrandbits(64) if request.sampling.seed is None else request.sampling.seed
        self._scheduler.submit(request, seed, self._clock())

    def cancel(self, request_id: str) -> TokenEvent | None:
        """End a request now; None if it has ended already."""
        return self._scheduler.cancel(request_id, self._clock())

    def step(self) -> list[TokenEvent]:
        """One step of work. Whatever the runner raises is fatal to the engine and not caught here."""
        began = self._clock()
        plan = self._scheduler.plan(began)
        result = self._runner.run(plan)
        now = self._clock()
        prompt, generated = self._scheduler.prompt_tokens, self._scheduler.generated_tokens
        events = self._scheduler.commit(plan, result, now)
        self._steps += 1
        self._prefill_rate.add(self._scheduler.prompt_tokens - prompt, now - began)
        self._decode_rate.add(self._scheduler.generated_tokens - generated, now - began)
        return events

    def stats(self) -> EngineStats:
        """Load as of now."""
        scheduler = self._scheduler
        waiting = scheduler.waiting
        return EngineStats(
            steps=self._steps,
            queued=len(waiting),
            queued_tokens=waiting.num_tokens,
            oldest_queued_seconds=0.0 if waiting.waiting_since is None else self._clock() - waiting.waiting_since,
            running=scheduler.num_running,
            max_batch_size=self.info.max_batch_size,
            kv_pages_used=self._pool.num_used,
            kv_pages_total=self._pool.num_pages,
            prompt_tokens=scheduler.prompt_tokens,
            generated_tokens=scheduler.generated_tokens,
            preemptions=scheduler.preemptions,
            prefill_tokens_per_second=self._prefill_rate.value,
            decode_tokens_per_second=self._decode_rate.value,
        )


class Rate:
    """Tokens per second of work, older work counting for exponentially less (time constant RATE_SECONDS)."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        keep = math.exp(-seconds / RATE_SECONDS)
        self._tokens = self._tokens * keep + tokens
        self._seconds = self._seconds * keep + seconds

    @property
    def value(self) -> float:
        return self._tokens / self._seconds if self._seconds > 0 else 0.0
