"""Cases of paged attention: decode, drafts and prefill, with plain and FP8 pages, with and without a window."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import torch

from bench.gpu.kernels import ATTENTION_TOLERANCE, Bench, Case, Named, named
from engine.ops import AttentionBatch, LayerCache
from engine.ops.reference import ReferenceOps, quantise

REFERENCE = ReferenceOps()
PAGE_SIZE = 64

Mix = tuple[tuple[int, int], ...]
"""(context before the step, new tokens) of each sequence."""


def attention_cases(bench: Bench) -> Iterator[Named]:
    work = bench.workload
    for mix in (*work.few, *work.many):
        for fp8 in (False, True):
            yield named(f"attention {_name(mix)}, {'FP8' if fp8 else 'plain'} cache", attention_case, bench, mix, fp8)
    for mix in (work.few[-1], work.many[-1]):
        window = work.window
        yield named(f"attention {_name(mix)}, window {window}", attention_case, bench, mix, False, window)


def attention_case(bench: Bench, mix: Mix, fp8: bool, window: int | None = None) -> Case:
    model = bench.workload.model
    batch = random_batch(bench, mix)
    cache = random_cache(bench, batch, fp8)
    query = bench.randn(len(batch.positions), model.num_heads + 2 * model.num_kv_heads, model.head_dim)
    query = query[:, : model.num_heads]  # strided, as of qkv
    seen = [min(past + new, window or past + new) for past, new in mix]
    token_bytes = cache.nbytes // (len(cache.keys) * PAGE_SIZE)
    pairs = sum(new * (past + (new + 1) / 2) if window is None else new * min(window, past + new) for past, new in mix)
    return Case(
        expected=lambda: [REFERENCE.attention(query, cache, batch, window).view(query.shape)],
        run=lambda: bench.ops.attention(query, cache, batch, window),
        outputs=lambda result: [result.view(query.shape)],
        tolerance=ATTENTION_TOLERANCE,
        nbytes=sum(seen) * token_bytes + 2 * query.numel() * query.element_size(),
        flops=4.0 * model.num_heads * model.head_dim * pairs,
    )


def random_batch(bench: Bench, mix: Mix) -> AttentionBatch:
    """Sequences whose pages lie in any order."""
    contexts = [past + new for past, new in mix]
    counts = [-(-context // PAGE_SIZE) for context in contexts]
    order = torch.split(torch.randperm(sum(counts)), counts)
    tables = torch.zeros(len(mix), max(counts), dtype=torch.int32)
    positions, slots = [], []
    for s, (past, new) in enumerate(mix):
        tables[s, : counts[s]] = order[s]
        position = torch.arange(past, past + new)
        positions.append(position)
        slots.append(order[s][position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE)
    starts = list(accumulate((new for _, new in mix), initial=0))
    device = bench.device
    return AttentionBatch(
        positions=torch.cat(positions).to(device),
        slots=torch.cat(slots).to(device),
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
        block_tables=tables.to(device),
        max_query_len=max(new for _, new in mix),
        max_context_len=max(contexts),
        query_starts_list=starts,
        context_lens_list=contexts,
    )


def random_cache(bench: Bench, batch: AttentionBatch, fp8: bool) -> LayerCache:
    """Pages for all contexts of a batch, every position of them written."""
    model = bench.workload.model
    pages = sum(-(-context // PAGE_SIZE) for context in batch.context_lens_list)
    keys, values = (bench.randn(pages, model.num_kv_heads, PAGE_SIZE, model.head_dim) for _ in range(2))
    if not fp8:
        return LayerCache(keys, values)
    (key_codes, key_scales), (value_codes, value_scales) = quantise(keys), quantise(values)
    return LayerCache(key_codes, value_codes, key_scales, value_scales)


def _name(mix: Mix) -> str:
    if len(set(mix)) == 1:
        past, new = mix[0]
        return f"{len(mix)} x {new} on {past}"
    return f"{len(mix)} mixed, {sum(new for _, new in mix)} tokens"
