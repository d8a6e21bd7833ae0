"""Recorded steps on the kernels themselves: a launch of a recording is made of the same numbers for every batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from msgspec.structs import replace

from engine.graphs import Graphs, Size
from engine.model.cache import KVCache
from engine.model.decoder import Decoder
from engine.model.rope import rope_table
from engine.ops.reference import ReferenceOps
from engine.ops.triton import TritonOps
from engine.rows import Rows
from engine.step import RowWork
from tests.engine.oracle import BASE, decoder_of, transformers_model

CPU = torch.device("cpu")
ONE_LAYER = replace(BASE, num_layers=1)
PAGE_SIZE, PAGES = 16, 6


def replayed(work: Callable[[], None]) -> Callable[[], None]:
    work()
    return work


@pytest.mark.parametrize("kv", [torch.float32, torch.float8_e4m3fn])
@torch.inference_mode()
def test_a_padded_step_says_what_the_specification_says(kv: torch.dtype) -> None:
    table = rope_table(ONE_LAYER, PAGE_SIZE * PAGES, CPU)
    weights = decoder_of(ONE_LAYER, transformers_model(ONE_LAYER)).weights
    kernels, plain = (Decoder(ONE_LAYER, weights, ops, table) for ops in (TritonOps((9, 0)), ReferenceOps()))
    caches = [KVCache.allocate(ONE_LAYER, 3 * PAGES, PAGE_SIZE, kv, CPU) for _ in range(2)]
    for cache in caches:
        for layer in cache.layers:
            for tensor in (layer.keys, layer.values, layer.key_scales, layer.value_scales):
                if tensor is not None:
                    tensor.copy_(torch.full(tensor.shape, torch.nan))
    sizes = [Size(4, 4, 1, PAGE_SIZE * PAGES), Size(4, 8, 4, PAGE_SIZE * PAGES)]
    graphs = Graphs(kernels, caches[0], sizes, PAGES, replayed)
    graphs.record()
    rows = Rows(3, PAGES, PAGE_SIZE, CPU)
    lengths = [0, 0, 0]
    generator = torch.Generator().manual_seed(0)
    for counts in ([0, 4, 1], [24, 0, 0], [1, 1, 1], [0, 1, 0], [2, 4, 1], [1, 0, 1]):
        work = []
        for row, count in enumerate(counts):
            if count:
                start, end = lengths[row], lengths[row] + count
                new = range(-(-start // PAGE_SIZE), -(-end // PAGE_SIZE))
                tokens = torch.randint(BASE.vocab_size, (count,), generator=generator).tolist()
                work.append(RowWork(row, start, tokens, [3 * page + row for page in new], sample=False))
                lengths[row] = end
        batch = rows.batch(work)
        wanted = plain.forward(batch.token_ids, batch.attention, caches[1])
        found = graphs.forward(batch.token_ids, batch.attention)
        assert (found is None) == (max(counts) > 4)
        if found is None:
            found = kernels.forward(batch.token_ids, batch.attention, caches[0])
        torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)
