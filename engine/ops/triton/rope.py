"""Rotation of queries and keys, and the write of keys and values, in one launch (spec: `ReferenceOps`).

    qkv row of a token   [ query heads | key heads | value heads ] · head_dim      a program takes HEADS of them
                            rotate in    rotate,      as they are,
                            place        to the page of the token's slot

A vector is read as its two halves, whose numbers are rotated in pairs (i, i + head_dim / 2), and stays in float32 until
it is stored: keys become codes without having been bfloat16 in between.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.ops.interface import AttentionBatch, LayerCache
from engine.ops.triton.e4m3 import encode_e4m3, magnitude, scale_e4m3

# 8 heads of 128 in bfloat16 are 2 KiB: 16 bytes for each of 64 threads in both halves. One token of NeMo is 6 programs:
# a decode of 32 fills an H100. More heads to a program would leave it idle, fewer would make prefill all overhead.
HEADS = 8
WARPS = 2


@triton.jit
def _store(first, second, pages, scales, vector, mask, column, half_mask, HALF: tl.constexpr, CODES: tl.constexpr):
    """Halves [HEADS, PAD] of vectors go to vector number `vector` [HEADS] of a cache, as they are or as codes."""
    head_dim = 2 * HALF
    where = pages + vector[:, None] * head_dim + column[None, :]
    stored = mask[:, None] & half_mask[None, :]
    if CODES:
        scale = scale_e4m3(tl.max(tl.maximum(magnitude(first), magnitude(second)), axis=1))
        tl.store(scales + vector, scale, mask=mask)
        scale = tl.broadcast_to(scale[:, None], first.shape)
        first, second = encode_e4m3(tl.div_rn(first, scale)), encode_e4m3(tl.div_rn(second, scale))
    tl.store(where, first.to(pages.dtype.element_ty), mask=stored)
    tl.store(where + HALF, second.to(pages.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])  # of a row in a step's tensors: of any
def _rope_and_write(
    qkv,
    table,
    positions,
    slots,
    keys,
    values,
    key_scales,
    value_scales,
    qkv_stride,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAD: tl.constexpr,
    PAGE: tl.constexpr,
    CODES: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, PAD)
    half_mask = column < HALF
    mask = (head < QUERY_HEADS + 2 * KV_HEADS)[:, None] & half_mask[None, :]

    vector = qkv + token * qkv_stride + head[:, None] * (2 * HALF) + column[None, :]
    first = tl.load(vector, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(vector + HALF, mask=mask, other=0.0).to(tl.float32)
    angles = table + tl.load(positions + token) * (2 * HALF) + column
    cos = tl.load(angles, mask=half_mask, other=0.0)[None, :]
    sin = tl.load(angles + HALF, mask=half_mask, other=0.0)[None, :]
    is_value = (head >= QUERY_HEADS + KV_HEADS)[:, None]
    first, second = (
        tl.where(is_value, first, first * cos - second * sin),
        tl.where(is_value, second, second * cos + first * sin),
    )

    is_query = (head < QUERY_HEADS)[:, None] & half_mask[None, :]
    tl.store(vector, first.to(qkv.dtype.element_ty), mask=is_query)
    tl.store(vector + HALF, second.to(qkv.dtype.element_ty), mask=is_query)

    slot = tl.load(slots + token)
    base = slot // PAGE * KV_HEADS * PAGE + slot % PAGE
    key, value = head - QUERY_HEADS, head - QUERY_HEADS - KV_HEADS
    written = slot >= 0
    is_key = written & (key >= 0) & (key < KV_HEADS)
    _store(first, second, keys, key_scales, base + key * PAGE, is_key, column, half_mask, HALF, CODES)
    is_value = written & (value >= 0) & (value < KV_HEADS)
    _store(first, second, values, value_scales, base + value * PAGE, is_value, column, half_mask, HALF, CODES)


def rope_and_write(qkv: Tensor, rope_table: Tensor, cache: LayerCache, batch: AttentionBatch) -> Tensor:
    """As `Ops.rope_and_write`; a token whose slot is negative is rotated and not written (padding of captured graphs).

    Args:
        qkv: rows may be strided.
    """
    _, kv_heads, page_size, head_dim = cache.keys.shape
    tokens, width = qkv.shape
    heads = width // head_dim - 2 * kv_heads
    codes = cache.key_scales is not None
    keys, values = (pages.view(torch.uint8) if codes else pages for pages in (cache.keys, cache.values))
    _rope_and_write[tokens, triton.cdiv(heads + 2 * kv_heads, HEADS)](
        qkv,
        rope_table,
        batch.positions,
        batch.slots,
        keys,
        values,
        cache.key_scales,
        cache.value_scales,
        qkv.stride(0),
        QUERY_HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        PAD=triton.next_power_of_2(head_dim // 2),
        PAGE=page_size,
        CODES=codes,
        HEADS=HEADS,
        num_warps=WARPS,
    )
    return qkv.view(tokens, -1, head_dim)[:, :heads]
