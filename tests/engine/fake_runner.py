"""A runner without a model that notices every mistake of a scheduler, and what its tokens must be.

Its pages hold token ids, and the next token is a hash of what a row's pages hold: a page that is lost, stale or out of
order changes the tokens, and so does an adapter that is not the one asked for. Beside each token stands a hash of all
that its keys and values depend on, so that a page is noticed that was computed with other weights or behind other
tokens, or never. A late one computes a step only when its result is asked for, as a device that is far behind its host.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from engine.request import EngineInfo, FinishReason, Request, TokenLogprob
from engine.step import LAST_SAMPLED, Masks, RowInit, RowWork, SampledToken, SlotFill, StepPlan, StepResult

VOCAB = 50
EOS = 7
NAN = 13  # a prompt with this token has logits that are not numbers
CRASH = 17  # a prompt with this token brings the runner down


def engine_info(
    *,
    page_size: int = 4,
    kv_pages: int = 64,
    max_batch_size: int = 4,
    max_batch_tokens: int = 16,
    max_model_len: int = 128,
    max_loras: int = 0,
) -> EngineInfo:
    return EngineInfo(
        vocab_size=VOCAB,
        max_model_len=max_model_len,
        max_batch_size=max_batch_size,
        max_batch_tokens=max_batch_tokens,
        page_size=page_size,
        kv_pages=kv_pages,
        dtype="none",
        device="none",
        architecture="fake",
        num_parameters=0,
        weight_bytes=0,
        load_seconds=0.0,
        max_loras=max_loras,
    )


def next_token(tokens: list[int], seed: int) -> int:
    return zlib.crc32(struct.pack(f"<Q{len(tokens)}q", seed, *tokens)) % VOCAB


def prompt_logprob(before: list[int], token: int) -> TokenLogprob:
    """Of a token of a prompt behind those before it."""
    return TokenLogprob(token, -float(next_token(before, token)), len(before))


@dataclass(frozen=True)
class Expected:
    token_ids: list[int]
    reason: FinishReason
    stop_token_id: int | None = None


def expected(request: Request, info: EngineInfo) -> Expected:
    """What a request must yield whatever else runs: written without steps, chunks or pages."""
    params, prompt = request.sampling, request.prompt_token_ids
    if NAN in prompt:
        return Expected([], FinishReason.ERROR)
    output: list[int] = []
    while len(output) < params.max_tokens and len(prompt) + len(output) < info.max_model_len:
        token = next_token(prompt + output, _stream(params.temperature, params.seed or 0, request.adapter))
        if len(output) >= params.min_tokens and (
            token in params.stop_token_ids or (token == EOS and not params.ignore_eos)
        ):
            return Expected(output, FinishReason.STOP, token)
        output.append(token)
    return Expected(output, FinishReason.LENGTH)


def _stream(temperature: float, seed: int, adapter: str | None) -> int:
    return (seed if temperature > 0 else 0) ^ (zlib.crc32(adapter.encode()) if adapter else 0)


@dataclass(frozen=True)
class FakeAdapter:
    """What is read from the path `name`; a request runs with it if the engine's adapter has that name."""

    name: str
    rank: int = 4
    nbytes: int = 100


class FakePool:
    """See `engine.core.AdapterPool`. `errors` are raised for the paths that they are under; `gate` holds reading up."""

    def __init__(self) -> None:
        self.kept: dict[int, FakeAdapter] = {}
        self.errors: dict[str, Exception] = {}
        self.gate: threading.Event | None = None

    def read(self, path: str) -> FakeAdapter:
        if self.gate is not None:
            assert self.gate.wait(30)
        if path in self.errors:
            raise self.errors[path]
        return FakeAdapter(path)

    def keep(self, number: int, adapter: FakeAdapter) -> None:
        assert number not in self.kept
        self.kept[number] = adapter

    def drop(self, number: int) -> None:
        del self.kept[number]


@dataclass(frozen=True)
class Cell:
    """A position of a page. `past` is what its keys and values depend on: the adapter and all tokens up to it."""

    token: int
    past: int


@dataclass
class Row:
    init: RowInit
    pages: list[int]
    computed: int = 0  # of known tokens
    written: int = 0  # with drafts that were wrong, whose places are written again
    last: int | None = None


class FakePending:
    """See `engine.core.Pending`."""

    def __init__(self, runner: FakeRunner, plan: StepPlan, filled: dict[SlotFill, str]) -> None:
        self.plan = plan
        self.filled = filled  # the host reads the matrices of an adapter when the step is launched
        self.computed: StepResult | None = None
        self._runner = runner

    def result(self) -> StepResult:
        return self._runner.result_of(self)


class FakeRunner:
    """See `engine.core.StepRunner`. `on_run` is called at the launch of each step."""

    eos_token_ids = (EOS,)

    def __init__(
        self, info: EngineInfo, on_run: Callable[[StepPlan], None] = lambda plan: None, late: bool = False
    ) -> None:
        self.info = info
        self.plans: list[StepPlan] = []
        self.most_in_flight = 0
        self._late = late
        self._in_flight: deque[FakePending] = deque()
        self._on_run = on_run
        self._pages: list[list[Cell | None]] = [[None] * info.page_size for _ in range(info.kv_pages)]
        self._rows: dict[int, Row] = {}
        self.adapters = FakePool() if info.max_loras else None
        self.slots: list[str | None] = [None] * info.max_loras
        self.closed = False

    def close(self) -> None:
        self.closed = True

    def launch(self, plan: StepPlan, masks: Masks | None = None) -> FakePending:
        assert masks is None, "this runner knows no grammars"
        self._on_run(plan)
        self.plans.append(plan)
        assert plan.num_tokens <= self.info.max_batch_tokens, "the budget is exceeded"
        assert len({work.row for work in plan.work}) == len(plan.work), "a row has work twice"
        assert not plan.fills or self.adapters is not None
        pending = FakePending(self, plan, {fill: self.adapters.kept[fill.adapter].name for fill in plan.fills})
        self._in_flight.append(pending)
        self.most_in_flight = max(self.most_in_flight, len(self._in_flight))
        if not self._late:
            pending.computed = self._compute(pending)
        return pending

    def run(self, plan: StepPlan) -> StepResult:
        return self.launch(plan).result()

    def result_of(self, pending: FakePending) -> StepResult:
        assert self._in_flight.popleft() is pending, "a result is asked for out of turn"
        return self._compute(pending) if pending.computed is None else pending.computed

    def _compute(self, pending: FakePending) -> StepResult:
        plan = pending.plan
        for row in plan.released:
            del self._rows[row]
        for fill in plan.fills:
            assert all(row.init.adapter != fill.slot for row in self._rows.values()), "a slot is in use"
            self.slots[fill.slot] = pending.filled[fill]
        for init in plan.admitted:
            assert 0 <= init.row < self.info.max_batch_size
            assert init.row not in self._rows, "an admitted row is in use"
            self._rows[init.row] = Row(init, [])
        for work in plan.work:
            self._write(work)
        targets = {work.row: self._score(work) for work in plan.work if work.targets is not None}
        sampled = [token for work in plan.work if work.sample for token in self._sample(work)]
        return StepResult(sampled, targets, model_seconds=0.25)

    def _write(self, work: RowWork) -> None:
        row, size = self._rows[work.row], self.info.page_size
        if not row.pages and work.start:  # it shares pages
            assert work.start % size == 0, "a shared page is not full"
            row.computed = work.start
        assert work.token_ids, "work without tokens"
        assert work.start == row.computed, "a row's work is not contiguous"
        assert work.drafts < len(work.token_ids), "drafts without a known token"
        assert not work.drafts or work.sample, "drafts behind a token that is not the last known one"
        row.pages += work.new_pages
        row.computed += len(work.token_ids) - work.drafts
        row.written = max(row.written, row.computed + work.drafts)
        assert len(row.pages) == -(-row.written // size), "a row has too few or too many pages"
        assert len(set(row.pages)) == len(row.pages), "a row has a page twice"
        written = set(row.pages[work.start // size :])
        for number, other in self._rows.items():
            assert number == work.row or written.isdisjoint(other.pages), "a page is written that another row has"
        token_ids = work.token_ids
        if LAST_SAMPLED in token_ids:
            assert len(token_ids) == 1, "only the last token can be unknown"
            assert row.last is not None, "the row has sampled no token"
            token_ids = [row.last]
        adapter = "" if row.init.adapter is None else self.slots[row.init.adapter]
        for position, token in enumerate(token_ids, work.start):
            before = self._cell(row, position - 1).past if position else 0
            past = zlib.crc32(f"{before} {token} {adapter}".encode())
            self._pages[row.pages[position // size]][position % size] = Cell(token, past)

    def _cell(self, row: Row, position: int) -> Cell:
        page, offset = divmod(position, self.info.page_size)
        cell = self._pages[row.pages[page]][offset]
        assert cell is not None, "a page was never written"
        return cell

    def _score(self, work: RowWork) -> list[TokenLogprob]:
        """Of each target a number that depends on all tokens before it, and not on the adapter."""
        row, targets = self._rows[work.row], work.targets
        assert targets is not None
        assert targets.token_ids, "targets without tokens"
        end = targets.start + len(targets.token_ids)
        assert work.start < targets.start, "the token before a target is not computed in its step"
        assert end <= work.start + len(work.token_ids) + 1, "a target stands behind what is computed"
        assert targets.token_ids == row.init.prompt_token_ids[targets.start : end], "a target is not the prompt's"
        known = [self._cell(row, position).token for position in range(end - 1)]
        return [
            prompt_logprob(known[:position], token) for position, token in enumerate(targets.token_ids, targets.start)
        ]

    def _sample(self, work: RowWork) -> list[SampledToken]:
        """The next token, and one more for each draft that is what the one before it says."""
        row, found = self._rows[work.row], [self._next(work.row)]
        for draft in work.token_ids[len(work.token_ids) - work.drafts :]:
            if found[-1].token_id != draft:
                break
            row.computed += 1
            found.append(self._next(work.row))
        return found

    def _next(self, number: int) -> SampledToken:
        row = self._rows[number]
        adapter = None if row.init.adapter is None else self.slots[row.init.adapter]
        known, past = [], 0
        for position in range(row.computed):
            cell = self._cell(row, position)
            past = zlib.crc32(f"{past} {cell.token} {adapter or ''}".encode())
            assert cell.past == past, "a page was computed behind other tokens, or with another adapter"
            known.append(cell.token)
        init, params = row.init, row.init.sampling
        prompt = init.prompt_token_ids
        assert known[: len(prompt) + len(init.output_token_ids)] == prompt + init.output_token_ids
        if CRASH in prompt:
            raise RuntimeError("the device is on fire")
        row.last = None
        if NAN in prompt:
            row.last = 0
            return SampledToken(number, -1, failed="the logits are not numbers")
        token = next_token(known, _stream(params.temperature, init.seed, adapter))
        row.last = token
        logprob = None if params.logprobs is None else TokenLogprob(token, -float(len(known)), 1)
        return SampledToken(number, token, logprob)
