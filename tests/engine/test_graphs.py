"""Recorded steps: the same tokens with and without, whatever comes and goes, on the operators' specification.

A recording is replaced by a function that computes again from and to the same memory, with operators that know what is
in tensors alone, as in a CUDA graph. They leave NaN where padding is, which no token may ever see.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from dataclasses import replace as replaced
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from engine import speculate
from engine.config import EngineConfig
from engine.graphs import PROMPT_TOKENS, SHORT_CONTEXT, Graphs, Replay, Size, batch_sizes, sizes
from engine.model.cache import KVCache
from engine.model.decoder import Decoder
from engine.model.rope import rope_table
from engine.ops import AttentionBatch, LayerCache, ReferenceOps
from engine.request import SamplingParams
from engine.rows import Batch, Rows
from engine.runner import Runner
from engine.sizing import CacheSize
from engine.step import RowInit, RowWork, SlotFill, StepPlan
from tests.engine.fake_drafts import Foreseen, texts_of
from tests.engine.oracle import BASE, decoder_of, transformers_model
from tests.engine.test_invariance import some_requests
from tests.engine.ways import Way, tokens_of
from tests.tiny_adapters import write_peft

PAGE_SIZE, MAX_LEN = 8, 96
CPU = torch.device("cpu")


class TensorOps(ReferenceOps):
    """The specification without the lists of a batch, which a replay could not see change."""

    replayable = True

    def rope_and_write(self, qkv: Tensor, rope_table: Tensor, cache: LayerCache, batch: AttentionBatch) -> Tensor:
        _, kv_heads, _, head_dim = cache.keys.shape
        out = qkv.new_full((len(qkv), qkv.shape[1] // head_dim - 2 * kv_heads, head_dim), torch.nan)
        real = batch.slots >= 0
        if real.any():
            some = replaced(batch, positions=batch.positions[real], slots=batch.slots[real])
            out[real] = super().rope_and_write(qkv[real], rope_table, cache, some)
        return out

    def attention(self, query: Tensor, cache: LayerCache, batch: AttentionBatch, window: int | None) -> Tensor:
        starts, contexts = batch.query_starts.tolist(), batch.context_lens.tolist()
        assert len(starts) == len(contexts) + 1
        assert max(contexts) <= batch.max_context_len
        counts = [after - before for before, after in pairwise(starts)]
        assert max(counts) <= batch.max_query_len
        real = sum(count > 0 for count in counts)
        known = replaced(batch, query_starts_list=starts[: real + 1], context_lens_list=contexts[:real])
        mixed = super().attention(query[: starts[real]], cache, known, window)
        out = mixed.new_full((len(query), mixed.shape[1]), torch.nan)
        out[: len(mixed)] = mixed
        return out


class Recorded:
    """`Record` that keeps count."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, work: Callable[[], None]) -> Replay:
        work()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            work()

        return replay


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    weights = decoder_of(BASE, transformers_model(BASE), max_len=MAX_LEN).weights
    return Decoder(BASE, weights, TensorOps(), rope_table(BASE, MAX_LEN, CPU))


@pytest.fixture(autouse=True)
def drafts_always_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculate, "CPU_READING", math.inf)


REQUESTS = some_requests(vocab_size=BASE.vocab_size, count=12, longest=40, new_tokens=24)
WAYS = {
    "alone": Way(batch=1),
    "in a crowd": Way(batch=8),
    "arriving late, one step ahead": Way(batch=6, gap=2, lookahead=1),
    "in chunks": Way(batch=5, budget=9, lookahead=1),
    "pre-empted": Way(batch=8, pages=14, preempts=True),
    "pre-empted, one step ahead": Way(batch=8, pages=14, preempts=True, lookahead=1),
    "with drafts": Way(batch=3, drafts=7),
    "with drafts, pre-empted, one step ahead": Way(batch=8, pages=12, preempts=True, drafts=3, lookahead=1),
}


def config_of(way: Way) -> EngineConfig:
    return EngineConfig(
        model_path="-",
        max_batch_size=way.batch,
        max_batch_tokens=way.budget,
        max_draft_tokens=way.drafts,
        lookahead=way.lookahead,
        page_size=PAGE_SIZE,
        threads=1,
    )


def runner_of(decoder: Decoder, way: Way, record: Recorded | None) -> Runner:
    each = MAX_LEN // PAGE_SIZE
    return Runner(config_of(way), decoder, CacheSize(way.pages or way.batch * each, MAX_LEN, each), record=record)


@pytest.fixture(scope="module")
def expected(decoder: Decoder) -> dict[str, list[int]]:
    """Nothing recorded, one after the other."""
    way = Way(batch=1, page_size=PAGE_SIZE, caching=False, shares=True)
    tokens = tokens_of(runner_of(eager(decoder), way, None), config_of(way), REQUESTS, way)
    assert len({tuple(each) for each in tokens.values()}) == len(tokens)
    return tokens


def eager(decoder: Decoder) -> Decoder:
    return Decoder(BASE, decoder.weights, ReferenceOps(), rope_table(BASE, MAX_LEN, CPU))


@pytest.mark.parametrize("name", WAYS)
def test_tokens_are_the_same_from_recorded_steps(
    decoder: Decoder, expected: dict[str, list[int]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    way, record = WAYS[name], Recorded()
    runner = runner_of(decoder, way, record)
    runner.warm_up()
    texts = texts_of(REQUESTS, expected)
    monkeypatch.setattr(speculate, "PromptLookup", lambda longest: Foreseen(texts, mistakes=0.2))
    recorded = record.recorded
    assert tokens_of(runner, config_of(way), REQUESTS, way) == expected
    assert record.replayed > 20
    assert record.recorded == recorded == len(sizes(way.batch, way.budget, way.drafts, MAX_LEN))


def greedy(*rows: int, logprobs: int | None = None) -> list[RowInit]:
    params = SamplingParams(temperature=0, logprobs=logprobs)
    return [RowInit(row, params, 0, [1], []) for row in rows]


def test_a_result_is_its_own_after_the_next_step_was_launched(decoder: Decoder) -> None:
    way = Way(batch=3)
    plans = [
        StepPlan(
            [RowWork(row, step, [7 * row + step], [row] * (step == 0), sample=True) for row in range(3 - step)],
            admitted=greedy(0, 1, 2, logprobs=3) if step == 0 else [],
        )
        for step in range(3)
    ]
    plain, record = runner_of(eager(decoder), way, None), Recorded()
    runner = runner_of(decoder, way, record)
    runner.warm_up()
    warm = record.replayed
    launched = [runner.launch(plan) for plan in plans]
    assert record.replayed == warm + 3
    for plan, step in zip(plans, launched, strict=True):
        for wanted, found in zip(plain.run(plan).sampled, step.result().sampled, strict=True):
            assert found.token_id == wanted.token_id
            assert found.logprob is not None
            assert wanted.logprob is not None
            assert found.logprob.logprob == pytest.approx(wanted.logprob.logprob, abs=1e-4)


class Direct:
    """Recorded steps and plain ones side by side, each with its own pages, on the same random work."""

    def __init__(self, decoder: Decoder, rows: int, drafts: int, tokens: int = 0, seed: int = 0) -> None:
        each = MAX_LEN // PAGE_SIZE
        self.record = Recorded()
        self.decoder = decoder
        self.random = torch.Generator().manual_seed(seed)
        self.rows = Rows(rows, each, PAGE_SIZE, CPU)
        self.caches = [KVCache.allocate(BASE, rows * each, PAGE_SIZE, torch.float32, CPU) for _ in range(2)]
        for cache in self.caches:
            for layer in cache.layers:
                layer.keys.fill_(torch.nan)
                layer.values.fill_(torch.nan)
        self.graphs = Graphs(decoder, self.caches[0], sizes(rows, tokens, drafts, MAX_LEN), each, self.record)
        self.lengths = [0] * rows
        self.pages = torch.randperm(rows * each, generator=self.random).view(rows, each).tolist()

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=self.random))

    def batch(self, rows: list[int], most: int) -> Batch:
        work = []
        for row in rows:
            count = self.integer(1, most)
            if self.lengths[row] + count > MAX_LEN:
                self.rows.clear(row)
                self.lengths[row] = 0
            start, end = self.lengths[row], self.lengths[row] + count
            new = self.pages[row][-(-start // PAGE_SIZE) : -(-end // PAGE_SIZE)]
            tokens = [self.integer(0, BASE.vocab_size - 1) for _ in range(count)]
            work.append(RowWork(row, start, tokens, new, sample=False))
            self.lengths[row] = end
        return self.rows.batch(work)

    def same(self, batch: Batch) -> bool:
        """The hidden states and all pages, those that nobody has written included."""
        wanted = eager(self.decoder).forward(batch.token_ids, batch.attention, self.caches[1])
        found = self.graphs.forward(batch.token_ids, batch.attention)
        assert found is not None
        pages = zip(*(cache.layers for cache in self.caches), strict=True)
        return torch.allclose(found, wanted, atol=1e-4) and all(
            torch.allclose(mine.keys, its.keys, atol=1e-4, equal_nan=True)
            and torch.allclose(mine.values, its.values, atol=1e-4, equal_nan=True)
            for mine, its in pages
        )


@pytest.mark.parametrize("drafts", [0, 7])
@torch.inference_mode()
def test_padding_reads_nothing_writes_nothing_and_reaches_nobody(decoder: Decoder, drafts: int) -> None:
    direct = Direct(decoder, rows=6, drafts=drafts)
    direct.graphs.record()
    for _ in range(40):
        rows = torch.randperm(6, generator=direct.random)[: direct.integer(1, 6)].tolist()
        assert direct.same(direct.batch(rows, 1 + drafts))
    assert direct.record.replayed == 40


@torch.inference_mode()
def test_prompts_and_chunks_are_replayed_beside_decodes(decoder: Decoder) -> None:
    direct = Direct(decoder, rows=5, drafts=0, tokens=128)
    direct.graphs.record()
    for _ in range(25):
        rows = torch.randperm(5, generator=direct.random)[: direct.integer(1, 5)].tolist()
        assert direct.same(direct.batch(rows, [1, 9, min(60, 128 // len(rows))][direct.integer(0, 2)]))
    assert direct.record.replayed == 25


@torch.inference_mode()
def test_recording_again_leaves_pages_alone(decoder: Decoder) -> None:
    direct = Direct(decoder, rows=4, drafts=3)
    direct.graphs.record()
    assert direct.same(direct.batch([0, 1, 2, 3], 4))
    for layer in direct.caches[0].layers:
        layer.keys.fill_(5)
    direct.graphs.record()
    assert all(bool((layer.keys == 5).all()) for layer in direct.caches[0].layers)


@torch.inference_mode()
def test_what_no_recording_holds_is_left_to_others(decoder: Decoder) -> None:
    direct = Direct(decoder, rows=4, drafts=0)
    batch = direct.batch([0, 1], 1)
    assert direct.graphs.forward(batch.token_ids, batch.attention) is None  # nothing is recorded yet
    direct.graphs.record()
    assert direct.same(batch)
    prompts = direct.rows.batch([RowWork(2, 0, [1, 2], [3], sample=True), RowWork(3, 0, [1], [4], sample=True)])
    assert direct.graphs.forward(prompts.token_ids, prompts.attention) is None
    assert direct.record.replayed == 1


def test_steps_with_adapters_are_not_replayed(decoder: Decoder, tmp_path: Path) -> None:
    write_peft(tmp_path, BASE, rank=4, alpha=64, seed=1)
    record = Recorded()
    config = replace(config_of(Way(batch=2)), max_loras=1)
    runner = Runner(config, decoder, CacheSize(24, MAX_LEN, 12), record=record)
    runner.warm_up()
    assert runner.adapters is not None
    runner.adapters.keep(3, runner.adapters.read(str(tmp_path)))
    [plain] = greedy(0, logprobs=0)
    adapted = replaced(plain, row=1, adapter=0)
    work = [RowWork(row, 0, [5], [row], sample=True) for row in (0, 1)]
    warm = record.replayed
    both = runner.run(StepPlan(work, admitted=[plain, adapted], fills=[SlotFill(0, 3)])).sampled
    assert record.replayed == warm
    alone = runner.run(StepPlan(work[:1], admitted=[plain], released=[0, 1])).sampled
    assert record.replayed == warm + 1
    said = [each.logprob and each.logprob.logprob for each in (*both, *alone)]
    assert said[0] == pytest.approx(said[2], abs=1e-4)
    assert said[1] != pytest.approx(said[2], abs=1e-2)


def test_batches_are_padded_by_a_third_at_most() -> None:
    assert [*batch_sizes(256)] == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert [*batch_sizes(1)] == [1]
    assert [*batch_sizes(40)] == [1, 2, 4, 8, 16, 24, 32, 40]
    for most in range(1, 1100):
        every = [*batch_sizes(most)]
        assert every == sorted(set(every))
        assert every[-1] == most
        assert all(after <= 3 * before / 2 for before, after in pairwise(every) if before >= 16)


@pytest.mark.parametrize(("rows", "drafts", "context"), [(1, 0, 96), (6, 7, 5000), (100, 3, 131072), (256, 7, 40000)])
def test_every_decode_has_a_size_and_drafts_have_one_as_long_as_launches_matter(
    rows: int, drafts: int, context: int
) -> None:
    every = sizes(rows, 300, drafts, context)
    assert len(every) == len(set(every))

    def first(sequences: int, tokens: int, longest: int, length: int) -> Size:
        batch = meta_batch(sequences, tokens, longest, length)
        return next(size for size in every if size.holds(batch))

    for length in {1, min(context, SHORT_CONTEXT), min(context, SHORT_CONTEXT + 1), context}:
        for sequences in range(1, rows + 1):
            size = first(sequences, sequences, 1, length)
            assert size.tokens == size.sequences == min(each for each in batch_sizes(rows) if each >= sequences)
            assert size.context == SHORT_CONTEXT if length <= SHORT_CONTEXT < context else size.context >= length
            for tokens in range(sequences + drafts, min(sequences * (1 + drafts), 64) + 1) if drafts else ():
                size = first(sequences, tokens, 1 + drafts, length)
                assert size.tokens <= max(16, 2 * (tokens - 1))
    for tokens in range(9, 257):
        size = first(min(rows, tokens), tokens, tokens, min(context, SHORT_CONTEXT))
        assert size.tokens == next(each for each in PROMPT_TOKENS if each >= tokens)
    beyond = meta_batch(1, 257, 257, 257), meta_batch(1, 128, 128, SHORT_CONTEXT + 1)
    assert not any(size.holds(batch) for size in every for batch in beyond)  # of the step, of the recordings' contexts


def meta_batch(sequences: int, tokens: int, longest: int, context: int) -> AttentionBatch:
    """Shapes without memory."""

    def of(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    return AttentionBatch(
        of(tokens), of(tokens), of(sequences + 1), of(sequences), of(sequences, 1), longest, context, [], []
    )


def test_recording_says_how_long_it_took(decoder: Decoder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="engine.graphs"):
        runner_of(decoder, Way(batch=2, budget=130), Recorded()).warm_up()
    [said] = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"3 step sizes recorded in \d+\.\d s", said)
