"""Pages of an FP8 cache as numbers, for prefill: decoded once for a prompt, and not again by each block of its queries.

    pages of codes, in any order ──► pages of numbers of the same shape, in order, and a block table that says so

Decoding in front of each matrix product keeps the matrix units waiting: attention of 8,192 tokens took an H100 half as
long again as over numbers. The copy costs a pass over the context, 1 % of that.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.ops.interface import AttentionBatch, LayerCache
from engine.ops.triton.e4m3 import decode_e4m3


@triton.jit(do_not_specialize=["table_stride", "first", "most"])
def _decode_pages(
    keys,
    values,
    key_scales,
    value_scales,
    plain_keys,
    plain_values,
    plain_tables,
    block_tables,
    context_lens,
    table_stride,
    first,
    most,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    PAGE_PAD: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
):
    """One page of one sequence and one head."""
    place, sequence, head = tl.program_id(0), first + tl.program_id(1), tl.program_id(2)
    if place * PAGE >= tl.load(context_lens + sequence):
        return
    page = tl.load(block_tables + sequence.to(tl.int64) * table_stride + place).to(tl.int64)
    target = tl.program_id(1) * most + place
    if head == 0:
        tl.store(plain_tables + sequence * most + place, target)
    token, column = tl.arange(0, PAGE_PAD), tl.arange(0, PAD)
    there = token < PAGE
    mask = there[:, None] & (column < DIM)[None, :]
    source = (page * KV_HEADS + head) * PAGE + token
    out = ((target.to(tl.int64) * KV_HEADS + head) * PAGE + token)[:, None] * DIM + column[None, :]
    where = source[:, None] * DIM + column[None, :]
    DTYPE: tl.constexpr = plain_keys.dtype.element_ty
    key = decode_e4m3(tl.load(keys + where, mask=mask, other=0.0), tl.float32)
    key *= tl.load(key_scales + source, mask=there, other=0.0)[:, None]
    tl.store(plain_keys + out, key.to(DTYPE), mask=mask)
    value = decode_e4m3(tl.load(values + where, mask=mask, other=0.0), tl.float32)
    value *= tl.load(value_scales + source, mask=there, other=0.0)[:, None]
    tl.store(plain_values + out, value.to(DTYPE), mask=mask)


class PlainPages:
    """Memory for the numbers of some sequences, taken at the first use, which is in warm-up, and kept.

    Args:
        limit: bytes at most; fewer where the whole cache as numbers is smaller.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._memory: Tensor | None = None

    def decode(
        self, cache: LayerCache, batch: AttentionBatch, first: int, dtype: torch.dtype, decodes: bool
    ) -> tuple[LayerCache, AttentionBatch] | None:
        """The sequences from `first` on as numbers of `dtype`, until the next call; None = there is no room for them.

        Args:
            decodes: the card has instructions for e4m3.
        """
        assert cache.key_scales is not None
        _, kv_heads, page_size, head_dim = cache.keys.shape
        if self._memory is None:
            size = min(self._limit // dtype.itemsize, 2 * cache.keys.numel())
            self._memory = torch.empty(size, dtype=dtype, device=cache.keys.device)
        sequences = len(batch.context_lens)
        most = -(-max(batch.context_lens_list[first:]) // page_size)
        shape = ((sequences - first) * most, kv_heads, page_size, head_dim)
        if 2 * math.prod(shape) > self._memory.numel():
            return None
        keys, values = (half.view(shape) for half in self._memory[: 2 * math.prod(shape)].chunk(2))
        tables = torch.empty(sequences, most, dtype=torch.int32, device=keys.device)
        codes = (each if decodes else each.view(torch.uint8) for each in (cache.keys, cache.values))
        _decode_pages[most, sequences - first, kv_heads](
            *codes, cache.key_scales, cache.value_scales, keys, values, tables, batch.block_tables, batch.context_lens,
            batch.block_tables.stride(0), first, most, KV_HEADS=kv_heads, PAGE=page_size,
            PAGE_PAD=triton.next_power_of_2(page_size), DIM=head_dim, PAD=triton.next_power_of_2(head_dim),
        )  # fmt: skip
        return LayerCache(keys, values), replace(batch, block_tables=tables)
