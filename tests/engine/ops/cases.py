"""Random caches and batches for the kernels, as `engine.ops.interface` draws them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.ops.interface import AttentionBatch, LayerCache
from engine.ops.reference import quantise

MIXES = {  # (context before the step, new tokens) of each sequence
    "decode": [(0, 1), (63, 1), (64, 1), (130, 1), (299, 1)],
    "draft": [(5, 3), (63, 8), (200, 1), (127, 5)],
    "prefill": [(0, 70), (0, 1), (0, 33)],
    "mixed": [(100, 1), (65, 50), (0, 7), (3, 2), (40, 1), (0, 129)],
}


@dataclass
class Case:
    batch: AttentionBatch
    cache: LayerCache


def make_case(mix: list[tuple[int, int]], kv_heads: int, dim: int, page_size: int, dtype: torch.dtype) -> Case:
    """A cache of shuffled pages. What no sequence owns is NaN, so that any read beyond a context shows."""
    contexts = [past + new for past, new in mix]
    pages_of = [-(-context // page_size) for context in contexts]
    total = sum(pages_of) + 3
    order = torch.randperm(total).tolist()
    tables = torch.full((len(mix), max(pages_of) + 1), 2**30, dtype=torch.int32)
    keys, values = (torch.full((total, kv_heads, page_size, dim), torch.nan, dtype=dtype) for _ in range(2))
    positions, slots, starts = [], [], [0]
    for s, (past, new) in enumerate(mix):
        pages = [order.pop() for _ in range(pages_of[s])]
        tables[s, : len(pages)] = torch.tensor(pages)
        position = torch.arange(past + new)
        page, offset = torch.tensor(pages)[position // page_size], position % page_size
        for stored in (keys, values):
            stored[page, :, offset] = torch.randn(len(position), kv_heads, dim).to(dtype)
        positions += position[past:].tolist()
        slots += (page * page_size + offset)[past:].tolist()
        starts.append(len(positions))
    batch = AttentionBatch(
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        block_tables=tables,
        max_query_len=max(new for _, new in mix),
        max_context_len=max(contexts),
        query_starts_list=starts,
        context_lens_list=contexts,
    )
    return Case(batch, LayerCache(keys, values))


def in_fp8(cache: LayerCache) -> LayerCache:
    """The same in codes. What is not a number stays none, by its scale alone: its codes are the largest number."""
    (keys, key_scales), (values, value_scales) = quantise(cache.keys), quantise(cache.values)
    for codes, scales in ((keys, key_scales), (values, value_scales)):
        codes.view(torch.uint8)[scales.isnan()] = 0x7E
    return LayerCache(keys, values, key_scales, value_scales)


def rotations(positions: int, dim: int) -> Tensor:
    """A table of random angles."""
    angles = torch.rand(positions, dim // 2) * 6
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Float32 to rounding; bfloat16 to one unit in the last place: the interpreter cuts where the hardware rounds."""
    assert actual.dtype == expected.dtype
    relative, absolute = (1e-5, 4e-6) if expected.dtype == torch.float32 else (2**-7, 1e-3)
    torch.testing.assert_close(actual, expected, rtol=relative, atol=absolute)
