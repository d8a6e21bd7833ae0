"""The core: schedule, run, sample, commit, emit. It owns all engine state and belongs to one thread, but for
`read_adapter`.

    add, cancel ─► Scheduler ──StepPlan──► runner ──StepResult──► Scheduler ─► TokenEvents

With a lookahead of 1 a step is planned and launched before the result of the one before it is looked at, so that the
device never waits for the host:

    device   │ step 1      │ step 2      │ step 3      │
    host   plan 1   plan 2  ▲ commit 1, plan 3  ▲ commit 2, plan 4 …          ▲ waits for the device

The tokens are the same. What it costs: a request that ends by its token is computed once more, and one that arrives
waits for one step more. With a lookahead of 0 each step is planned when the one before it has been committed.
"""

from __future__ import annotations

import math
import random
import secrets
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from engine.adapters import Adapters
from engine.config import EngineConfig
from engine.costs import StepCosts
from engine.errors import AdapterLimitError, EngineConfigError, InvalidRequestError
from engine.grammar.compiler import Grammars
from engine.grammar.matcher import FIELD, Matcher
from engine.kv.pages import PagePool
from engine.request import AdapterInfo, EngineInfo, EngineStats, Request, TokenEvent, Vocabulary, validate_request
from engine.scheduler import Scheduler
from engine.speculate import speculation_of
from engine.step import LAST_SAMPLED, Masks, StepPlan, StepResult

RATE_SECONDS = 5.0  # of work, over which tokens per second are averaged


class ReadAdapter(Protocol):
    """What the core needs of `engine.model.lora.HostAdapter`."""

    @property
    def rank(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


class AdapterPool(Protocol):
    """What the core needs of `engine.model.lora.LoraPool`."""

    def read(self, path: str) -> ReadAdapter: ...

    def keep(self, number: int, adapter: Any) -> None: ...

    def drop(self, number: int) -> None: ...


class Pending(Protocol):
    """A step that was launched."""

    def result(self) -> StepResult:
        """What it computed; waits for the device. Called once, in the order of the launches."""


class StepRunner(Protocol):
    """What the core needs of `engine.runner.Runner`."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def adapters(self) -> AdapterPool | None:
        """None if the engine has no slots for them."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    def launch(self, plan: StepPlan, masks: Masks | None = None) -> Pending:
        """Begin a step. Its effects follow those of all that were launched before; whether it returns before it is done
        is the device's affair.

        Args:
            masks: of the rows that have grammars; None = no row that samples has one.
        """

    def close(self) -> None:
        """End what it has started beside itself."""


class _Flight:
    """A step between its launch and its commit."""

    def __init__(self, plan: StepPlan, pending: Pending, began: float) -> None:
        self.plan = plan
        self.began = began
        self._pending = pending
        self._result: StepResult | None = None

    def result(self) -> StepResult:
        """What it computed; waits for the device the first time."""
        if self._result is None:
            self._result = self._pending.result()
        return self._result


class EngineCore:
    """Requests in, TokenEvents out, one `step` at a time."""

    def __init__(self, runner: StepRunner, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
        info = runner.info
        self.info = info
        self._runner = runner
        self._clock = clock
        self._pool = PagePool(info.kv_pages)
        self._adapters = Adapters(info.max_loras)
        self._max_adapters = config.max_cpu_loras
        self._scheduler = Scheduler(
            self._pool,
            page_size=info.page_size,
            max_batch_size=info.max_batch_size,
            max_batch_tokens=info.max_batch_tokens,
            max_model_len=info.max_model_len,
            eos_token_ids=runner.eos_token_ids,
            adapters=self._adapters,
            prefix_caching=config.prefix_caching,
            speculation=speculation_of(config, info.device),
        )
        self._lookahead = config.lookahead_on(info.device)
        self._grammars: Grammars | None = None
        self._flights: deque[_Flight] = deque()
        self._committed = -math.inf  # when the last step was
        self._seeds = random.Random(config.seed if config.seed is not None else secrets.randbits(64))
        self._steps = 0
        self._step_seconds = 0.0
        self._model_seconds = 0.0
        self._busy_since: float | None = None  # the end of the step before, if there was more to do
        self._prefill_rate = Rate()
        self._decode_rate = Rate()
        self._costs = StepCosts()

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or bool(self._flights)

    @property
    def is_compiling(self) -> bool:
        """A request waits for its grammar: `admit_compiled` is to be called now and then."""
        return self._grammars is not None and self._grammars.is_compiling

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """What the tokens mean that grammars are about. A model has one vocabulary: the first that is told counts."""
        if self._grammars is None:
            self._grammars = Grammars(vocabulary, self.info.vocab_size, self._runner.eos_token_ids)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: names the field, the value and the limit.
            AdapterNotFoundError: names the adapter and those that are loaded.
        """
        validate_request(request, self.info)
        adapter = None if request.adapter is None else self._adapters.find(request.adapter)
        constrained = request.sampling.grammar is not None
        if constrained and self._grammars is None:
            raise InvalidRequestError(FIELD, "cannot be served: this engine was told no vocabulary")
        seed = self._seeds.getrandbits(64) if request.sampling.seed is None else request.sampling.seed
        self._scheduler.submit(request, seed, self._clock(), adapter)
        if constrained and self._grammars is not None:
            self._grammars.compile(request.request_id, request.sampling)

    def admit_compiled(self) -> list[TokenEvent]:
        """Let those run whose grammars are compiled, and say which requests end because theirs cannot be."""
        if self._grammars is None:
            return []
        events = []
        for request_id, matcher in self._grammars.take().items():
            if isinstance(matcher, InvalidRequestError):
                events.append(self._scheduler.refuse(request_id, matcher, self._clock()))
            else:
                self._scheduler.set_matcher(request_id, matcher, self._clock())
        self._drop_adapters()
        return events

    def cancel(self, request_id: str) -> TokenEvent | None:
        """End a request now; None if it has ended already."""
        event = self._scheduler.cancel(request_id, self._clock())
        if self._grammars is not None:
            self._grammars.cancel(request_id)
        self._drop_adapters()
        if not self.has_work:
            self._busy_since = None
        return event

    def read_adapter(self, name: str, path: str) -> ReadAdapter:
        """Read the files of an adapter, for `add_adapter`. From any thread.

        Raises:
            CheckpointError: it is missing, broken, or does not fit the model and the rank limit.
            AdapterLimitError: it would be one too many.
            EngineConfigError: this engine has no slots for adapters.
        """
        if self._runner.adapters is None:
            raise EngineConfigError("max_loras: 0, so that this engine serves no adapters")
        self._check_limit(name)
        return self._runner.adapters.read(path)

    def add_adapter(self, name: str, adapter: ReadAdapter) -> AdapterInfo:
        """Requests find it by its name from now on, instead of any that had the name.

        Raises:
            AdapterLimitError: it would be one too many.
        """
        assert self._runner.adapters is not None
        self._check_limit(name)
        info = AdapterInfo(name=name, rank=adapter.rank, nbytes=adapter.nbytes)
        self._runner.adapters.keep(self._adapters.add(info).number, adapter)
        self._drop_adapters()
        return info

    def remove_adapter(self, name: str) -> None:
        """Requests do not find it any more; those that have it end with it, and then its memory is free.

        Raises:
            AdapterNotFoundError: there is none of this name.
        """
        self._adapters.remove(name)
        self._drop_adapters()

    def _check_limit(self, name: str) -> None:
        if name not in self._adapters and len(self._adapters) >= self._max_adapters:
            raise AdapterLimitError(f"max_cpu_loras: {self._max_adapters} adapters are loaded, {name!r} is too many")

    def _drop_adapters(self) -> None:
        """Give back the memory of those that nobody needs any more."""
        for number in self._adapters.take_dropped():
            assert self._runner.adapters is not None
            self._runner.adapters.drop(number)

    def step(self) -> list[TokenEvent]:
        """Launch the next step, and commit the first in flight once there are more than the lookahead, or nothing to
        launch. Whatever the runner raises is fatal to the engine and not caught here."""
        began = self._clock()
        plan = self._scheduler.plan(began)
        if not plan.is_empty:
            self._flights.append(_Flight(plan, self._runner.launch(plan, self._masks(plan)), began))
            if len(self._flights) <= self._lookahead:
                return []
        return self._commit(self._flights.popleft()) if self._flights else []

    def _masks(self, plan: StepPlan) -> Masks | None:
        """Of a step that is about to be launched. A token that is coming is waited for, but not committed: the device
        computes the logits meanwhile, and has those masks for it when it has done so."""
        constrained = self._scheduler.constrained(plan)
        if not constrained:
            return None
        before = self._flights[-1] if any(work.token_ids == [LAST_SAMPLED] for _, work in constrained) else None

        def masks() -> dict[int, bytes]:
            asked: dict[int, tuple[Matcher, list[int]]] = {}
            coming = {} if before is None else {each.row: each.token_id for each in before.result().sampled}
            for sequence, work in constrained:
                assert sequence.matcher is not None
                if work.token_ids == [LAST_SAMPLED]:
                    sequence.matcher.follow(sequence.num_output, coming[work.row])
                asked[work.row] = sequence.matcher, work.token_ids[len(work.token_ids) - work.drafts :]
            assert self._grammars is not None
            return self._grammars.masks(asked)

        return masks

    def _commit(self, flight: _Flight) -> list[TokenEvent]:
        result = flight.result()
        now = self._clock()
        prompt, generated = self._scheduler.prompt_tokens, self._scheduler.generated_tokens
        events = self._scheduler.commit(flight.plan, result, now)
        committed = self._scheduler.committed
        self._drop_adapters()
        self._steps += 1
        seconds = now - max(flight.began, self._committed)  # before that the time was the step's before it
        self._committed = now
        self._prefill_rate.add(self._scheduler.prompt_tokens - prompt, seconds)
        self._decode_rate.add(self._scheduler.generated_tokens - generated, seconds)
        self._model_seconds += result.model_seconds
        ended = self._clock()
        whole = ended - (flight.began if self._busy_since is None else self._busy_since)
        self._step_seconds += whole
        if committed.tokens:
            self._costs.add(whole, committed.tokens, committed.decode_rows, committed.context_tokens)
        self._busy_since = ended if self.has_work else None
        return events

    def check(self) -> None:
        """Look for lost pages and rows; takes time with the size of the KV cache, so it is for idle moments.

        Raises:
            AssertionError: the books are wrong, and with them what comes next.
        """
        self._scheduler.check()

    def close(self) -> None:
        """No step will come any more."""
        if self._grammars is not None:
            self._grammars.close()
        self._runner.close()

    def stats(self) -> EngineStats:
        """Load as of now."""
        scheduler, now = self._scheduler, self._clock()
        waiting, compiling = scheduler.waiting, scheduler.compiling
        return EngineStats(
            steps=self._steps,
            step_seconds=self._step_seconds,
            model_seconds=self._model_seconds,
            queued=len(waiting) + len(compiling),
            queued_tokens=waiting.num_tokens + compiling.num_tokens,
            oldest_queued_seconds=now - min(waiting.since(now), compiling.since(now)),
            blocked=len(compiling) + scheduler.num_without_slot,
            running=scheduler.num_running,
            max_batch_size=self.info.max_batch_size,
            kv_pages_used=self._pool.num_used,
            kv_pages_total=self._pool.num_pages,
            prompt_tokens=scheduler.prompt_tokens,
            generated_tokens=scheduler.generated_tokens,
            preemptions=scheduler.preemptions,
            corrupted=scheduler.corrupted,
            prefix_cache_query_tokens=scheduler.prefix_query_tokens,
            prefix_cache_hit_tokens=scheduler.prefix_hit_tokens,
            draft_tokens=scheduler.draft_tokens,
            accepted_draft_tokens=scheduler.accepted_draft_tokens,
            prefill_tokens_per_second=self._prefill_rate.value,
            decode_tokens_per_second=self._decode_rate.value,
            step_times=self._costs.seconds.distribution,
            batch_tokens=self._costs.tokens.distribution,
            step_cost=self._costs.cost,
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
