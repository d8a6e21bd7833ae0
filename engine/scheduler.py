"""Who runs in the next step, and with how many tokens. Pure: no clock of its own, no tensors, no randomness.

One rule: every request has a number of computed tokens and catches up with its known tokens (prompt + output) under a
token budget. What others call decode is catching up by one; prefill is catching up by many; a chunk is what the budget
leaves; a pre-empted request has computed nothing and catches up again.

    submit ─► waiting (heap by priority, arrival) ─► running (a row, pages) ─► finished
                     ▲                                   │ pages run out: the last in (priority, arrival)
                     └───────────────────────────────────┘ gives its own back and keeps its tokens and its place

Invariants, tested as properties: the budget is never exceeded; a page has one owner; every submitted request gets
exactly one terminal event; the first in (priority, arrival) always advances, so that everything ends.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.kv.pages import PagePool
from engine.request import FinishReason, Request, Timings, TokenEvent
from engine.step import RowInit, RowWork, SampledToken, StepPlan, StepResult


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way.

    Attributes:
        order: (priority, arrival number); smaller runs first and is pre-empted last.
        computed: tokens whose keys and values are in pages.
        tokens: known tokens, prompt and output.
    """

    request: Request
    seed: int
    order: tuple[int, int]
    arrived: float
    tokens: list[int]
    computed: int = 0
    row: int | None = None
    pages: list[int] = field(default_factory=list)
    started: float | None = None
    first_token: float | None = None

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    def __lt__(self, other: Sequence) -> bool:
        return self.order < other.order


class Scheduler:
    """Plans steps and commits their results. One step is in flight at a time: plan, run, commit."""

    def __init__(
        self,
        pool: PagePool,
        *,
        page_size: int,
        max_batch_size: int,
        max_batch_tokens: int,
        max_model_len: int,
        eos_token_ids: Iterable[int],
    ) -> None:
        self._pool = pool
        self._page_size = page_size
        self._budget = max_batch_tokens
        self._max_model_len = max_model_len
        self._eos = frozenset(eos_token_ids)
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []  # sorted by order
        self._by_id: dict[str, Sequence] = {}
        self._rows = list(range(max_batch_size - 1, -1, -1))
        self._released: list[int] = []
        self._planned: dict[int, Sequence] = {}  # by row
        self._arrivals = 0
        self.preemptions = 0
        self.prompt_tokens = 0  # computed; those computed again after a pre-emption count again
        self.generated_tokens = 0

    @property
    def has_work(self) -> bool:
        """There is something to compute, or a row to be released."""
        return bool(self._by_id or self._released)

    @property
    def waiting(self) -> list[Sequence]:
        """Requests not in the batch, in no order."""
        return self._waiting

    @property
    def num_running(self) -> int:
        return len(self._running)

    def submit(self, request: Request, seed: int, now: float) -> None:
        """Queue a valid request whose id is not in use.

        Args:
            seed: of its random stream.
            now: seconds on the clock that all times here are on.
        """
        assert request.request_id not in self._by_id, f"request {request.request_id} is in flight already"
        self._arrivals += 1
        sequence = Sequence(request, seed, (request.priority, self._arrivals), now, list(request.prompt_token_ids))
        self._by_id[request.request_id] = sequence
        heapq.heappush(self._waiting, sequence)

    def cancel(self, request_id: str, now: float) -> TokenEvent | None:
        """End a request between two steps; its pages are free for the next one. None if there is no such request."""
        sequence = self._by_id.get(request_id)
        return None if sequence is None else self._end(sequence, FinishReason.CANCELLED, now)

    # -- planning ----------------------------------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan:
        """Choose the next step's work within the budget, taking rows and pages for it."""
        work: dict[Sequence, RowWork] = {}
        admitted: list[RowInit] = []
        budget = self._budget
        preempted = False
        # Decodes first: a long prompt must not hold up the streams that are already flowing.
        for sequence in sorted(self._running, key=lambda each: (len(each.tokens) - each.computed > 1, each.order)):
            if sequence.row is None or budget == 0:
                continue
            wanted = min(len(sequence.tokens) - sequence.computed, budget)
            while (count := self._room(sequence, wanted)) == 0:
                victim = self._running[-1]
                self._preempt(victim)
                preempted = True
                if (lost := work.pop(victim, None)) is not None:
                    budget += len(lost.token_ids)
                if victim is sequence:
                    break
            if sequence.row is not None:
                work[sequence] = self._advance(sequence, count)
                budget -= count
        while self._waiting and self._rows and budget and not preempted:
            sequence = self._waiting[0]
            if self._pages_for(len(sequence.tokens)) > self._pool.num_free:
                break  # first come, first served: nobody overtakes because it is smaller
            heapq.heappop(self._waiting)
            admitted.append(self._admit(sequence, now))
            count = min(len(sequence.tokens), budget)
            work[sequence] = self._advance(sequence, count)
            budget -= count
        released, self._released = self._released, []
        self._planned = {item.row: sequence for sequence, item in work.items()}
        return StepPlan(list(work.values()), admitted, released)

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    def _room(self, sequence: Sequence, wanted: int) -> int:
        """How many of the wanted tokens the sequence's own and the free pages hold."""
        held = (len(sequence.pages) + self._pool.num_free) * self._page_size
        return min(wanted, held - sequence.computed)

    def _advance(self, sequence: Sequence, count: int) -> RowWork:
        """Take pages for the next `count` tokens; there is room."""
        end = sequence.computed + count
        new_pages = self._pool.take(self._pages_for(end) - len(sequence.pages))
        assert new_pages is not None
        assert sequence.row is not None
        sequence.pages += new_pages
        tokens = sequence.tokens[sequence.computed : end]
        return RowWork(sequence.row, sequence.computed, tokens, new_pages, sample=end == len(sequence.tokens))

    def _admit(self, sequence: Sequence, now: float) -> RowInit:
        sequence.row = self._rows.pop()
        sequence.started = sequence.started if sequence.started is not None else now
        self._running.append(sequence)
        self._running.sort()
        prompt = sequence.num_prompt
        return RowInit(
            sequence.row, sequence.request.sampling, sequence.seed, sequence.tokens[:prompt], sequence.tokens[prompt:]
        )

    def _preempt(self, sequence: Sequence) -> None:
        self._free(sequence)
        sequence.computed = 0
        heapq.heappush(self._waiting, sequence)
        self.preemptions += 1

    def _free(self, sequence: Sequence) -> None:
        """Take a running sequence's row and pages away."""
        assert sequence.row is not None
        self._running.remove(sequence)
        self._pool.give_back(sequence.pages)
        sequence.pages = []
        self._rows.append(sequence.row)
        self._released.append(sequence.row)
        sequence.row = None

    # -- committing --------------------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> list[TokenEvent]:
        """Take note of what the step computed, and say what it did to each request that got a token."""
        sampled = {each.row: each for each in result.sampled}
        events = []
        for work in plan.work:
            sequence = self._planned[work.row]
            sequence.computed += len(work.token_ids)
            self.prompt_tokens += min(sequence.computed, sequence.num_prompt) - min(work.start, sequence.num_prompt)
            if work.sample:
                events.append(self._take(sequence, sampled[work.row], now))
        self._planned = {}
        return events

    def _take(self, sequence: Sequence, sampled: SampledToken, now: float) -> TokenEvent:
        """Append one sampled token, or end the request."""
        params = sequence.request.sampling
        if sequence.first_token is None:
            sequence.first_token = now
        if sampled.failed is not None:
            return self._end(sequence, FinishReason.ERROR, now, error=sampled.failed)
        token = sampled.token_id
        if token in params.stop_token_ids or (token in self._eos and not params.ignore_eos):
            return self._end(sequence, FinishReason.STOP, now, stop_token_id=token)
        sequence.tokens.append(token)
        self.generated_tokens += 1
        logprobs = None if sampled.logprob is None else [sampled.logprob]
        if sequence.num_output >= params.max_tokens or len(sequence.tokens) >= self._max_model_len:
            return self._end(sequence, FinishReason.LENGTH, now, token_ids=[token], logprobs=logprobs)
        return TokenEvent(
            request_id=sequence.request.request_id,
            token_ids=[token],
            logprobs=logprobs,
            prompt_tokens=sequence.num_prompt,
            timings=self._timings(sequence, now) if sequence.num_output == 1 else None,
        )

    def _end(self, sequence: Sequence, reason: FinishReason, now: float, **details: object) -> TokenEvent:
        """Remove a request, wherever it is, and make its terminal event."""
        if sequence.row is not None:
            self._free(sequence)
        else:
            self._waiting.remove(sequence)
            heapq.heapify(self._waiting)
        del self._by_id[sequence.request.request_id]
        return TokenEvent(
            request_id=sequence.request.request_id,
            finish_reason=reason,
            prompt_tokens=sequence.num_prompt,
            timings=self._timings(sequence, now),
            **details,  # type: ignore[arg-type]
        )

    def _timings(self, sequence: Sequence, now: float) -> Timings:
        started = now if sequence.started is None else sequence.started
        first = now if sequence.first_token is None else sequence.first_token
        arrived = sequence.arrived
        return Timings(queued=started - arrived, first_token=first - arrived, finished=now - arrived)
