"""Who runs in the next step, and with how many tokens. Pure: no clock of its own, no tensors, no randomness.

One rule: every request has a number of computed tokens and catches up with its known tokens (prompt + output) under a
token budget. What others call decode is catching up by one; prefill is catching up by many; a chunk is what the budget
leaves; a pre-empted request has computed nothing and catches up again.

    submit ─► waiting, by (priority, arrival) ─► running (a row, pages) ─► finished
                     ▲                               │ pages run out, or a higher class waits: the last in (priority,
                     └───────────────────────────────┘ arrival) gives its own back and keeps its tokens and its place

Requests that begin alike hold the same pages (`engine.kv.prefix`): what is found when a request takes its row, its
first or another one, counts as computed.

A priority is a class. A higher one does not wait for rows or pages that a lower one holds, nor for a long prompt of it;
for the slot of an adapter it does. This is strict: while higher classes fill the batch, a lower one waits, and only its
deadline bounds that.

A request with a grammar waits in a line of its own until that is compiled, and is admitted as who arrived when it did.
What it may choose in a step depends on all its tokens; a mask says it, which is asked for when those are known.

A request with a LoRA adapter runs only while the adapter has a slot on the device. Where all slots are in use by rows
that run, it waits, and is overtaken by requests without an adapter alone: they need no slot, so that its slot comes no
later for them. Others may not pass, even where their own adapter has a slot: they could hold it for ever.

A step can be planned while the one before it is in flight. A sequence then counts as if that step had been committed,
but for the token that is coming, whose value the plan leaves open; one that the coming token ends for its length is
left out. Drafts need the token itself: where they are likely to pay, nothing is planned ahead of it. What only the
token can tell, that it stops the request, is seen one step late: the row was computed once more, for nothing. The rules
that keep this safe:

- What a step in flight computes for a request that has ended since is dropped. What it computes for one that was
  pre-empted since counts; until it has come, the sequence is not admitted again.
- Rows and pages are free at once, though a step in flight may still write to them: who gets them next does so in a
  later step, and the runner's steps take effect strictly in their order.
- A page is found by others only if all its tokens are known.

Invariants, tested as properties: the budget is never exceeded; nobody writes into a page that others hold; every
submitted request gets exactly one terminal event; the first in (priority, arrival) always advances, so that everything
ends.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from msgspec.structs import replace

from engine.adapters import Adapters, LoadedAdapter
from engine.ending import Ending
from engine.errors import InvalidRequestError
from engine.grammar.matcher import Matcher
from engine.holdings import Holdings
from engine.kv.pages import PagePool
from engine.kv.prefix import Prefix
from engine.request import FinishReason, Request, TokenEvent, TokenLogprob
from engine.sequence import Sequence, WaitingLine
from engine.speculate import Drafter, Patience, Speculation, Step
from engine.step import LAST_SAMPLED, Committed, RowInit, RowWork, SampledToken, StepPlan, StepResult, Targets


@dataclass(slots=True)
class Agenda:
    """A step's plan while it is made."""

    budget: int
    work: dict[Sequence, RowWork] = field(default_factory=dict)
    admitted: list[RowInit] = field(default_factory=list)


class Scheduler:
    """Plans steps and commits their results, in the same order; at most one step behind: plan, plan, commit, plan, …"""

    def __init__(
        self,
        pool: PagePool,
        *,
        page_size: int,
        max_batch_size: int,
        max_batch_tokens: int,
        max_model_len: int,
        eos_token_ids: Iterable[int],
        adapters: Adapters | None = None,
        prefix_caching: bool = True,
        speculation: Speculation | None = None,
    ) -> None:
        self._page_size = page_size
        self._budget = max_batch_tokens
        self._speculation = speculation
        self._patience = Patience()
        self._max_logits = max_batch_size if speculation is None else max(max_batch_size, 1 + speculation.max_tokens)
        self._ending = Ending(eos_token_ids, max_model_len)
        self._prefix_caching = prefix_caching
        self._adapters = adapters if adapters is not None else Adapters(slots=0)
        self._holdings = Holdings(pool, self._adapters, page_size, max_batch_size)
        self.waiting = WaitingLine()
        self.compiling = WaitingLine()
        self._by_id: dict[str, Sequence] = {}
        self._max_rows = max_batch_size
        self._in_flight: deque[list[Sequence]] = deque()  # of each step, in the order of its work
        self._arrivals = 0
        self.preemptions = 0
        self.corrupted = 0
        self.prompt_tokens = 0  # computed; those computed again after a pre-emption count again
        self.generated_tokens = 0
        self.prefix_query_tokens = 0  # of prompts that were started
        self.prefix_hit_tokens = 0  # of these: found
        self.draft_tokens = 0
        self.accepted_draft_tokens = 0
        self.committed = Committed()  # of the latest step

    @property
    def has_work(self) -> bool:
        """There is something to compute, or a row to be released."""
        return len(self._by_id) > len(self.compiling) or self._holdings.has_released

    @property
    def num_running(self) -> int:
        return len(self._holdings.running)

    @property
    def num_without_slot(self) -> int:
        """How many of those that wait do so for the slot of an adapter, their own or that of one before them."""
        first = self.waiting.first_adapted
        return 0 if first is None or self._holdings.has_slot(first) else self.waiting.num_adapted

    def submit(self, request: Request, seed: int, now: float, adapter: LoadedAdapter | None = None) -> None:
        """Queue a request that `engine.request.validate_request` has passed: it fits into an empty pool.

        Args:
            seed: of its random stream.
            now: seconds on the clock that all times here are on.
            adapter: what request.adapter means now; held until the request ends, whatever becomes of the name.

        Raises:
            InvalidRequestError: its id is in use.
        """
        if request.request_id in self._by_id:
            raise InvalidRequestError("request_id", f"{request.request_id} is in flight already")
        self._arrivals += 1
        order, tokens = (request.priority, self._arrivals), list(request.prompt_token_ids)
        prefix = None
        if self._prefix_caching:
            number = None if adapter is None else adapter.number
            prefix = Prefix(tokens, self._page_size, request.cache_salt, number)
        sequence = Sequence(request, seed, order, now, tokens, prefix, adapter)
        self._by_id[request.request_id] = sequence
        if adapter is not None:
            self._adapters.hold(adapter)
        (self.compiling if sequence.has_grammar else self.waiting).push(sequence, now)

    def set_matcher(self, request_id: str, matcher: Matcher, now: float) -> None:
        """The grammar of a request is there: it can be admitted."""
        sequence = self._by_id[request_id]
        self.compiling.remove(sequence)
        sequence.matcher = matcher
        self.waiting.push(sequence, now)

    def refuse(self, request_id: str, error: InvalidRequestError, now: float) -> TokenEvent:
        """End a request whose grammar cannot be compiled."""
        sequence = self._by_id[request_id]
        return self._end(sequence, FinishReason.ERROR, now, error=error.reason, refused=error.field)

    def cancel(self, request_id: str, now: float) -> TokenEvent | None:
        """End a request between two steps; its pages are free for the next one. None if there is no such request."""
        sequence = self._by_id.get(request_id)
        return None if sequence is None else self._end(sequence, FinishReason.CANCELLED, now)

    def check(self) -> None:
        """Raise AssertionError unless every page and row is where it belongs. For tests and idle moments."""
        self._holdings.check()
        lines = self.waiting, self.compiling
        assert len(self._by_id) == self.num_running + sum(map(len, lines)), "a request is lost"

    # -- planning ----------------------------------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan:
        """Choose the next step's work within the budget, taking rows and pages for it. Empty if there is nothing to do
        before a step in flight is committed."""
        if self._in_flight and self._waits_for_tokens():
            return StepPlan([])
        self._make_way(now)
        agenda = Agenda(self._budget)
        growing = [
            sequence for sequence in self._holdings.running if self._ending.tokens_left(sequence) > sequence.coming
        ]
        # Decodes first: a long prompt must not hold up the streams that are already flowing.
        decoding = [sequence for sequence in growing if sequence.behind == 1]
        prefilling = [sequence for sequence in growing if sequence.behind > 1]
        for sequence in decoding:
            self._catch_up(agenda, sequence, now)
        for sequence in prefilling:
            while (newcomer := self._next(agenda)) is not None and newcomer.outranks(sequence):
                self._admit(agenda, newcomer, now)
            self._catch_up(agenda, sequence, now)
        while (newcomer := self._next(agenda)) is not None:
            self._admit(agenda, newcomer, now)
        if self._speculation is not None and self._patience.lasts:
            self._speculate(agenda, self._speculation)
        released, fills = self._holdings.take_released(), self._adapters.take_fills()
        plan = StepPlan(list(agenda.work.values()), agenda.admitted, released, fills)
        if not plan.is_empty:
            self._launch(agenda.work)
        return plan

    def constrained(self, plan: StepPlan) -> list[tuple[Sequence, RowWork]]:
        """Of the step that was planned last: work that chooses tokens under a grammar."""
        if not self._in_flight or plan.is_empty:
            return []
        planned = zip(self._in_flight[-1], plan.work, strict=True)
        return [(sequence, work) for sequence, work in planned if work.sample and sequence.matcher is not None]

    def _launch(self, planned: dict[Sequence, RowWork]) -> None:
        """From now on the sequences count as if the step were done, but for the tokens that it samples."""
        for sequence, work in planned.items():
            sequence.computed = work.start + len(work.token_ids)
            sequence.coming += work.sample
            sequence.in_flight += 1
            sequence.guessing = work.drafts > 0
            sequence.scored += 0 if work.targets is None else len(work.targets.token_ids)
        self._in_flight.append(list(planned))

    def _make_way(self, now: float) -> None:
        """Pre-empt lower classes, the last first, for those of higher ones that this step can admit then.

        Nobody gives way to who could not run even so (as far as pages tell that others hold as well).
        """
        holdings, running = self._holdings, self._holdings.running
        if not (self.waiting and running and self.waiting.first.outranks(running[-1])):
            return
        rows, pages, budget, newcomers = holdings.free_rows, holdings.free_pages, self._budget, 0
        for newcomer in self.waiting.first_few(self._max_rows, plain=not holdings.has_slot(self.waiting.first)):
            if not holdings.has_slot(newcomer):
                return
            lower = [sequence for sequence in running if newcomer.outranks(sequence)]
            most = pages + sum(len(sequence.pages) for sequence in lower)
            needed = holdings.pages_to_take(newcomer) + len(running) - len(lower) + newcomers
            if not lower or needed > most:
                return
            while lower and (not rows or holdings.pages_to_take(newcomer) + len(running) + newcomers > pages):
                free = holdings.free_pages
                self._preempt(lower.pop(), now)
                rows, pages = rows + 1, pages + holdings.free_pages - free
            rows, pages, newcomers = rows - 1, pages - holdings.pages_to_take(newcomer), newcomers + 1
            budget -= holdings.tokens_to_compute(newcomer)
            if rows < 0 or budget <= 0:
                return

    def _catch_up(self, agenda: Agenda, sequence: Sequence, now: float) -> None:
        """Plan work for one that runs, pre-empting the last in (priority, arrival) while pages lack.

        Not after an admission: the newcomer may count on pages that the last one fills in this very step. The next step
        finds it planned.
        """
        while agenda.budget and sequence.row is not None:
            if count := self._room(sequence, agenda.budget):
                self._advance(agenda, sequence, count)
                return
            if agenda.admitted:
                return
            victim = self._holdings.running[-1]
            if (lost := agenda.work.pop(victim, None)) is not None:
                agenda.budget += len(lost.token_ids)
                self._holdings.forget_pages(victim, lost.start)
            self._preempt(victim, now)

    def _next(self, agenda: Agenda) -> Sequence | None:
        """Who is admitted now: the first that waits, if there are a row and pages for all its tokens. Nobody overtakes
        it for being smaller, or for finding its pages, or while a step that it was pre-empted after is in flight; while
        it waits for a slot, the first without an adapter does.

        One page is left for each that runs: without it the newcomer would soon be pre-empted by those who grow, and
        computed twice. The rule cannot block: an empty batch needs no such reserve, and uses no slot.
        """
        if not (agenda.budget and self.waiting and self._holdings.free_rows):
            return None
        first: Sequence | None = self.waiting.first
        if first is not None and not self._holdings.has_slot(first):
            first = self.waiting.first_plain
        if first is None or first.in_flight:
            return None
        needed = self._holdings.pages_to_take(first) + self.num_running
        return first if needed <= self._holdings.free_pages else None

    def _room(self, sequence: Sequence, budget: int) -> int:
        """How many tokens the sequence can compute: those it is behind, as far as budget and pages go."""
        return min(sequence.behind, budget, self._holdings.room(sequence) - sequence.computed)

    def _advance(self, agenda: Agenda, sequence: Sequence, count: int, found: Iterable[int] = ()) -> None:
        """Plan the next `count` tokens of a sequence and take pages for them, behind those `found`; there is room."""
        end = sequence.computed + count
        new_pages = self._holdings.grow(sequence, end)
        assert sequence.row is not None
        tokens = sequence.tokens[sequence.computed : end] or [LAST_SAMPLED]
        sample = end == sequence.length
        targets = self._targets(sequence, end)
        work = RowWork(sequence.row, sequence.computed, tokens, [*found, *new_pages], sample, targets)
        agenda.work[sequence] = work
        agenda.budget -= count
        self._holdings.name_pages(sequence, end)

    def _speculate(self, agenda: Agenda, speculation: Speculation) -> None:
        """Put drafts behind the known tokens of rows that decode, as far as they pay, out of what all others left."""
        step = Step(sum(len(work.token_ids) for work in agenda.work.values()), speculation.reading)
        logits = self._max_logits - sum(work.sample for work in agenda.work.values())
        for sequence, work in agenda.work.items():
            if sequence.drafter is None or not work.sample or len(work.token_ids) > 1 or sequence.coming:
                continue
            known = len(sequence.tokens)
            room = self._holdings.room(sequence, spare=self.num_running) - known  # as for a newcomer
            limit = min(speculation.max_tokens, agenda.budget, logits, room, self._ending.tokens_left(sequence) - 1)
            drafts = sequence.drafter.propose(sequence.tokens, limit, step) if limit > 0 else []
            if sequence.matcher is not None:
                drafts = sequence.matcher.fitting(drafts)
            if not drafts:
                continue
            pages = self._holdings.grow(sequence, known + len(drafts))
            agenda.work[sequence] = dataclasses.replace(
                work, token_ids=work.token_ids + drafts, new_pages=work.new_pages + pages, drafts=len(drafts)
            )
            agenda.budget -= len(drafts)
            logits -= len(drafts)

    def _waits_for_tokens(self) -> bool:
        """Drafts are in flight, or likely to pay behind tokens that are coming. Then all wait for those: rows that are
        left out of a step would fall behind the others."""
        guessable = [each for each in self._holdings.running if each.coming and each.drafter is not None]
        return bool(guessable) and (self._patience.wait() or any(sequence.guessing for sequence in guessable))

    def _targets(self, sequence: Sequence, end: int) -> Targets | None:
        """The prompt's tokens whose logprobs are known when `end` tokens are computed, and that no step was asked for
        yet: what is computed again after a pre-emption is not said again."""
        top = sequence.request.sampling.prompt_logprobs
        token_ids = sequence.tokens[sequence.scored : min(end + 1, sequence.num_prompt)]
        return None if top is None or not token_ids else Targets(sequence.scored, token_ids, top)

    def _admit(self, agenda: Agenda, sequence: Sequence, now: float) -> None:
        """Give a row to one that waits, and the pages that it finds; plan its first work."""
        self.waiting.remove(sequence)
        slot = self._holdings.enter(sequence)
        assert sequence.row is not None
        if sequence.started is None:
            sequence.started = now
            sequence.cached = sequence.computed
            sequence.drafter = self._drafter(sequence)
            self.prefix_query_tokens += sequence.num_prompt
            self.prefix_hit_tokens += sequence.cached
        prompt, output = sequence.tokens[: sequence.num_prompt], sequence.tokens[sequence.num_prompt :]
        agenda.admitted.append(RowInit(sequence.row, sequence.request.sampling, sequence.seed, prompt, output, slot))
        self._advance(agenda, sequence, self._room(sequence, agenda.budget), list(sequence.pages))

    def _drafter(self, sequence: Sequence) -> Drafter | None:
        """None where penalties make logits depend on the tokens that are chosen: then no guess can run ahead."""
        if self._speculation is None or sequence.request.sampling.has_penalties:
            return None
        return Drafter(self._speculation.source(len(sequence.tokens) + self._ending.tokens_left(sequence)))

    def _preempt(self, sequence: Sequence, now: float) -> None:
        self._holdings.leave(sequence)
        self.waiting.push(sequence, now)
        self.preemptions += 1

    # -- committing --------------------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> list[TokenEvent]:
        """Take note of what the step computed, and say what it did to each request that got a token or logprobs.

        Args:
            plan: the first that is not committed yet.
        """
        if plan.is_empty:
            return []
        computed = decoding = context = 0
        sampled: dict[int, list[SampledToken]] = {}
        for each in result.sampled:
            sampled.setdefault(each.row, []).append(each)
        events, guessable, stood = [], 0, 0
        for work, sequence in zip(plan.work, self._in_flight.popleft(), strict=True):
            tokens, count = sampled.get(work.row, []), len(work.token_ids)
            accepted = len(tokens) - 1 if work.drafts else 0
            self.draft_tokens += work.drafts
            stood += accepted
            decodes = work.sample and count == 1 + work.drafts
            guessable += decodes and sequence.drafter is not None and work.token_ids[0] != LAST_SAMPLED
            computed += count
            decoding += decodes
            context += work.start + count
            end = work.start + count - work.drafts + accepted
            self.prompt_tokens += min(end, sequence.num_prompt) - min(work.start, sequence.num_prompt)
            if sequence.ended:
                continue
            sequence.in_flight -= 1
            sequence.coming -= work.sample
            if work.drafts:
                sequence.computed, sequence.guessing = end, False
            logprobs = None if work.targets is None else result.targets[work.row]
            event = self._note(sequence, logprobs, tokens, now)
            if event is not None:
                events.append(event if logprobs is None else replace(event, prompt_logprobs=logprobs))
        self.accepted_draft_tokens += stood
        self.committed = Committed(computed, decoding, context)
        self._patience.learn(guessable, stood)
        return events

    def _note(
        self, sequence: Sequence, logprobs: list[TokenLogprob] | None, sampled: list[SampledToken], now: float
    ) -> TokenEvent | None:
        """What a step did to one request: logprobs of its prompt are added by the caller."""
        if logprobs is not None and not all(math.isfinite(each.logprob) for each in logprobs):
            self.corrupted += 1
            return self._end(sequence, FinishReason.ERROR, now, error="the logits of the prompt are not numbers")
        if sampled:
            return self._take(sequence, sampled, now)
        if logprobs is None:
            return None
        return TokenEvent(
            request_id=sequence.request.request_id,
            prompt_tokens=sequence.num_prompt,
            cached_tokens=sequence.cached,
        )

    def _take(self, sequence: Sequence, sampled: list[SampledToken], now: float) -> TokenEvent:
        first = sequence.num_output == 0
        if sequence.first_token is None:
            sequence.first_token = now
        taken = self._ending.take(sequence, sampled)
        self.generated_tokens += len(taken.token_ids)
        self.corrupted += taken.corrupted
        if taken.reason is not None:
            return self._end(
                sequence,
                taken.reason,
                now,
                token_ids=taken.token_ids,
                logprobs=taken.logprobs or None,
                stop_token_id=taken.stop_token_id,
                error=taken.error,
            )
        return TokenEvent(
            request_id=sequence.request.request_id,
            token_ids=taken.token_ids,
            logprobs=taken.logprobs or None,
            prompt_tokens=sequence.num_prompt,
            cached_tokens=sequence.cached,
            timings=sequence.timings(now) if first else None,
        )

    def _end(self, sequence: Sequence, reason: FinishReason, now: float, **details: object) -> TokenEvent:
        """Remove a request, wherever it is, and make its terminal event."""
        if reason is FinishReason.ERROR:  # whatever made its numbers wrong, nobody else shall have them
            self._holdings.forget_tokens(sequence)
        if sequence.row is not None:
            self._holdings.leave(sequence)
        else:
            compiling = sequence.has_grammar and sequence.matcher is None
            (self.compiling if compiling else self.waiting).remove(sequence)
        sequence.ended = True
        del self._by_id[sequence.request.request_id]
        if sequence.adapter is not None:
            self._adapters.release(sequence.adapter)
        return TokenEvent(
            request_id=sequence.request.request_id,
            finish_reason=reason,
            prompt_tokens=sequence.num_prompt,
            cached_tokens=sequence.cached,
            timings=sequence.timings(now),
            **details,  # type: ignore[arg-type]
        )
