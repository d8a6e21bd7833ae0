"""Paged attention over keys and values in pages, one kernel for decode, drafts, prefill and chunks upon a long context.

    program = (queries of one sequence) × (one kv head with its group of query heads) × (one part of the context)

                     keys of the sequence, tile by tile through its block table ──►
      rows: query 0 · head 0   ┌───────────────┬───────────────┬───────┐
            query 0 · head 1   │  part 0       │  part 1       │ part 2│  each part: softmax(q·kᵀ)·v of its own keys and
            query 1 · head 0   │  a program    │  a program    │       │  log2 Σ 2^score; `_combine` weighs the parts by
            query 1 · head 1   └───────────────┴───────────────┴───────┘  it (flash-decoding, arXiv 2311.01282)

The heads of a group share the keys, so that they are rows of one matrix product; softmax is online (arXiv 2205.14135),
in base 2. All that depends on lengths is read on the device: a launch depends on the number of sequences and tokens and
on `max_context_len` and `max_query_len` alone, so that a captured graph serves every batch within those.

Prefill is the same kernel with more rows, not a library's: torch's attention kernels want keys in one piece, so that
each layer would gather the whole context; of them cuDNN's has no window, and FlashAttention's none of FP8. Here a
window, any page size and a chunk upon a context are the same few lines. Codes of a long prompt's context are decoded
once beforehand (`pages`).
Reference: `ReferenceOps.attention`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.limits import PLAIN_PAGES_FROM, WORKSPACE
from engine.ops.interface import AttentionBatch, LayerCache
from engine.ops.triton.e4m3 import decode_e4m3
from engine.ops.triton.pages import PlainPages

FEW_QUERIES = 8  # of a sequence that is attended to as decode: the last token and drafts behind it
FEW_ROWS = 64  # at most, of queries × heads of a group, but where one query has more
MAX_PARTS, MANY_MAX_PARTS = 64, 8  # of a context; where queries are many, they fill a card with fewer
PROGRAMS = 528  # four to each multiprocessor of an H100: contexts are cut into parts as long as there are no more
LEAST_PART = 1024  # tokens of a part where queries are many, whose sums cost as much to put together as to make
PART_TOKENS = 4096  # so that among short sequences a long one is not left to one multiprocessor: 2 MiB of bfloat16


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program has in hand: rows of queries × keys, by how many warps, loads how many tiles ahead."""

    rows: int
    keys: int
    warps: int
    stages: int


def few_tile(rows: int, head_dim: int, dtype: torch.dtype, fp8: bool, decodes: bool) -> Tile:
    """For decode, which waits for memory: 1 µs of an H100's 3.35 TB/s is 25 KB in flight on each multiprocessor.

    A tile of 64 keys and values of 128 is 32 KiB in bfloat16, 16 KiB in FP8; several programs share a multiprocessor,
    so that one has its data while others wait for theirs. Codes are decoded between memory and product, where warps
    wait for one another: with two of them, and more programs, an H100 is done in four fifths of the time of four.

    Args:
        decodes: by instructions of the card. An A100 decodes bits, for which it needs all registers of two warps.
    """
    if dtype == torch.float32:
        return Tile(rows, 32, 8, 1)
    if head_dim > 128:
        return Tile(rows, 32, 4, 5)
    if fp8:
        return Tile(rows, 64, 2, 4) if decodes and rows == 16 else Tile(rows, 64, 4, 5)
    return Tile(rows, 64, 4, 3)


def many_tile(head_dim: int, dtype: torch.dtype, fp8: bool, large: bool) -> Tile:
    """For prefill, which waits for the matrix units: as many rows as registers hold beside their sums.

    128 rows of 128 float32 sums are 64 registers in each of 256 threads, scores of 64 keys half of that; keys are on
    their way far ahead, since loading them is what an H100 waits for with fewer stages. Codes cost registers too.

    Args:
        large: 227 KiB of shared memory, of Hopper and the data centre's Blackwell; else what 99 KiB hold.
    """
    if dtype == torch.float32:
        return Tile(32, 32, 8, 1)
    if head_dim > 128:
        return Tile(64, 32, 8, 3)
    if fp8:
        return Tile(64, 128, 4, 2) if large else Tile(128, 32, 8, 5)
    return Tile(128, 64, 8, 5)


@triton.jit
def _locate(program, query_starts, sequences, few, FEW: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Which queries of which sequence: its number, the first token of it, how many it has, the first of this program.

    With FEW a program has all queries of a sequence of at most `few`; else BLOCK_Q of a sequence of more. Sequence s
    has the programs from query_starts[s] // BLOCK_Q + s on: enough for any length, and one too many has no queries.
    """
    if FEW:
        sequence = program
        first = 0
    else:
        sequence = 0
        beyond = sequences
        while beyond - sequence > 1:
            middle = (sequence + beyond) // 2
            before = tl.load(query_starts + middle) // BLOCK_Q + middle <= program
            sequence = tl.where(before, middle, sequence)
            beyond = tl.where(before, beyond, middle)
        first = (program - tl.load(query_starts + sequence) // BLOCK_Q - sequence) * BLOCK_Q
    start = tl.load(query_starts + sequence)
    queries = tl.load(query_starts + sequence + 1) - start
    return sequence, start, tl.where((queries <= few) == FEW, queries, 0), first


@triton.jit
def _load(pages, rows, inside, column, DIM: tl.constexpr, PAD: tl.constexpr, MASKED: tl.constexpr):
    """Vectors [keys, PAD] of a cache; zeros where there are none."""
    where = pages + rows[:, None] * DIM + column[None, :]
    if MASKED:
        return tl.load(where, mask=inside[:, None] & (column < DIM)[None, :], other=0.0)
    if PAD != DIM:
        return tl.load(where, mask=(column < DIM)[None, :], other=0.0)
    return tl.load(where)


@triton.jit
def _attend_to(
    begin,
    end,
    sums,
    total,
    largest,
    query,
    position,
    table,
    head,
    keys,
    values,
    key_scales,
    value_scales,
    scale,
    window,
    column,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    CODES: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
):
    """Takes the keys begin .. end - 1 into sums [rows, PAD], total and largest [rows]; begin is whole tiles from 0.

    Without MASKED, every row sees all of them, and they are whole tiles.
    """
    for first in range(begin, end, BLOCK_N):
        key_position = first + tl.arange(0, BLOCK_N)
        inside = key_position < end
        if PAGE % BLOCK_N == 0:  # a tile lies in one page
            page = tl.load(table + first // PAGE)
            rows = (page.to(tl.int64) * KV_HEADS + head) * PAGE + first % PAGE + tl.arange(0, BLOCK_N)
        else:
            page = tl.load(table + key_position // PAGE, mask=inside, other=0)
            rows = (page.to(tl.int64) * KV_HEADS + head) * PAGE + key_position % PAGE
        key = _load(keys, rows, inside, column, DIM, PAD, MASKED)
        if CODES:
            scores = tl.dot(query, tl.trans(decode_e4m3(key, DOT)), input_precision="ieee")
            scores *= tl.load(key_scales + rows, mask=inside, other=0.0)[None, :]
        else:
            scores = tl.dot(query, tl.trans(key.to(DOT)), input_precision="ieee")
        if MASKED:
            seen = inside[None, :] & (key_position[None, :] <= position[:, None])
            if WINDOW:
                seen = seen & (key_position[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, axis=1) * scale)
        finite = tl.where(now == float("-inf"), 0.0, now)  # a row that has seen nothing yet
        weights = tl.exp2(scores * scale - finite[:, None])  # one multiply-add for each
        shrink = tl.exp2(largest - finite)
        total = total * shrink + tl.sum(weights, axis=1)
        largest = now
        value = _load(values, rows, inside, column, DIM, PAD, MASKED)
        if CODES:
            value_scale = tl.load(value_scales + rows, mask=inside, other=0.0)
            weights *= value_scale[None, :]
            value = decode_e4m3(value, DOT)
        sums = tl.dot(weights.to(DOT), value.to(DOT), sums * shrink[:, None], input_precision="ieee")
    return sums, total, largest


@triton.jit(
    do_not_specialize=["sequences", "few", "table_stride", "window", "wanted", "part_tokens"],
    do_not_specialize_on_alignment=["query_starts", "context_lens", "block_tables"],
)
def _attention(
    query,
    keys,
    values,
    key_scales,
    value_scales,
    out,
    part_lse,
    query_starts,
    context_lens,
    block_tables,
    query_stride,
    table_stride,
    sequences,
    few,
    window,
    wanted,
    part_tokens,
    scale,
    FEW: tl.constexpr,
    PARTS: tl.constexpr,
    WINDOW: tl.constexpr,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
):
    # The last queries of a sequence have most keys: they begin first, so that no long program is left to the end.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    head, part = tl.program_id(1), tl.program_id(2)
    sequence, start, queries, first = _locate(program, query_starts, sequences, few, FEW, BLOCK_Q)
    if first >= queries:
        return
    row = tl.arange(0, BLOCK_M)
    in_block, query_head = row // GROUP, head * GROUP + row % GROUP
    exists = (in_block < BLOCK_Q) & (first + in_block < queries)
    context = tl.load(context_lens + sequence)
    position = context - queries + first + in_block
    begin = 0
    end = tl.minimum(context, context - queries + first + BLOCK_Q)
    if WINDOW:
        begin = tl.maximum(context - queries + first - window + 1, 0) // BLOCK_N * BLOCK_N
    parts = tl.num_programs(2)
    lse = part_lse + ((program * BLOCK_Q + in_block) * KV_HEADS * GROUP + query_head) * parts + part
    if PARTS:
        used = tl.minimum(parts, tl.maximum(wanted, tl.cdiv(end - begin, part_tokens)))
        length = tl.cdiv(tl.cdiv(end - begin, used), BLOCK_N) * BLOCK_N
        begin += part * length
        end = tl.minimum(end, begin + length)
        if begin >= end:
            tl.store(lse, float("-inf"), mask=exists)
            return

    column = tl.arange(0, PAD)
    mask = exists[:, None] & (column < DIM)[None, :]
    where = (start + first + in_block)[:, None] * query_stride + query_head[:, None] * DIM + column[None, :]
    numbers = tl.load(query + where, mask=mask, other=0.0).to(DOT)
    sums = tl.zeros([BLOCK_M, PAD], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    table = block_tables + sequence.to(tl.int64) * table_stride
    diagonal = begin
    if not FEW and not WINDOW:  # tiles that every row sees whole need no mask
        diagonal = tl.minimum(end, context - queries + first + 1) // BLOCK_N * BLOCK_N
        diagonal = tl.maximum(begin, diagonal)
        sums, total, largest = _attend_to(
            begin, diagonal, sums, total, largest, numbers, position, table, head, keys, values, key_scales,
            value_scales, scale, window, column, False, WINDOW, CODES, KV_HEADS, PAGE, DIM, PAD, BLOCK_N, DOT,
        )  # fmt: skip
    sums, total, largest = _attend_to(
        diagonal, end, sums, total, largest, numbers, position, table, head, keys, values, key_scales,
        value_scales, scale, window, column, True, WINDOW, CODES, KV_HEADS, PAGE, DIM, PAD, BLOCK_N, DOT,
    )  # fmt: skip

    nothing = total == 0.0  # seen by a row: in a part before its window, or padding of a captured graph
    total = tl.where(nothing, 1.0, total)
    sums /= total[:, None]
    if PARTS:
        tl.store(lse, tl.where(nothing, float("-inf"), largest + tl.log2(total)), mask=exists)
        vector = ((program * BLOCK_Q + in_block) * KV_HEADS * GROUP + query_head) * parts + part
    else:
        vector = (start + first + in_block) * KV_HEADS * GROUP + query_head
    tl.store(out + vector[:, None] * DIM + column[None, :], sums.to(out.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["sequences", "few", "parts"],
    do_not_specialize_on_alignment=["query_starts"],
)
def _combine(
    part_sums,
    part_lse,
    out,
    query_starts,
    sequences,
    few,
    parts,
    FEW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    """One head of one query: the mean of its parts, weighed by 2 ** lse."""
    program, in_block, head = tl.program_id(0) // BLOCK_Q, tl.program_id(0) % BLOCK_Q, tl.program_id(1)
    _, start, queries, first = _locate(program, query_starts, sequences, few, FEW, BLOCK_Q)
    if first + in_block >= queries:
        return
    part, column = tl.arange(0, MAX_PARTS), tl.arange(0, PAD)
    vector = (tl.program_id(0) * HEADS + head) * parts + part
    lse = tl.load(part_lse + vector, mask=part < parts, other=float("-inf"))
    largest = tl.max(lse, axis=0)
    weights = tl.exp2(lse - tl.where(largest == float("-inf"), 0.0, largest))
    mask = (lse != float("-inf"))[:, None] & (column < DIM)[None, :]  # else nobody wrote the sums
    sums = tl.load(part_sums + vector[:, None] * DIM + column[None, :], mask=mask, other=0.0)
    total = tl.sum(weights, axis=0)
    mean = tl.sum(sums * weights[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    where = ((start + first + in_block) * HEADS + head) * DIM + column
    tl.store(out + where, mean.to(out.dtype.element_ty), mask=column < DIM)


def attention(
    query: Tensor,
    cache: LayerCache,
    batch: AttentionBatch,
    window: int | None,
    capability: tuple[int, int],
    plain_pages: PlainPages | None = None,
) -> Tensor:
    """As `Ops.attention`. Sequences of few new tokens and of many are two launches: each passes over the other's, and
    there is one where a look at the batch's list says that all are many.

    A sequence without a context (padding of a captured graph) gets zeros.

    Args:
        capability: of the card. Before (8, 9) Triton has no float8, and codes are decoded from their bits.
        plain_pages: room for codes as numbers, which long prompts have them read as.
    """
    _, kv_heads, _, head_dim = cache.keys.shape
    tokens, heads, _ = query.shape
    group = heads // kv_heads
    out = query.new_empty(tokens, heads * head_dim)
    few = max(1, min(FEW_QUERIES, FEW_ROWS // group))
    sequences, longest = len(batch.context_lens), batch.max_query_len
    fp8 = cache.key_scales is not None
    alike = batch.query_starts_list and tokens == sequences * longest  # a recorded batch has no list: it may be any
    if longest <= few or not alike:
        block = 1 if longest == 1 else few
        rows = max(16, triton.next_power_of_2(block * group))
        tile = few_tile(rows, head_dim, query.dtype, fp8, decodes=capability >= (8, 9))
        _launch(query, cache, batch, window, out, capability, tile, block, few, sequences, is_few=True)
    if longest > few:
        if fp8 and plain_pages is not None and longest >= PLAIN_PAGES_FROM and batch.query_starts_list:
            first = next(i for i, (begin, end) in enumerate(pairwise(batch.query_starts_list)) if end - begin > few)
            plain = plain_pages.decode(cache, batch, first, query.dtype, capability >= (8, 9))
            cache, batch = plain or (cache, batch)
            fp8 = plain is None
        tile = many_tile(head_dim, query.dtype, fp8, large=capability[0] in (9, 10))
        block = max(1, tile.rows // group)
        programs = tokens // block + sequences
        _launch(query, cache, batch, window, out, capability, tile, block, few, programs, is_few=False)
    return out


def _launch(
    query: Tensor,
    cache: LayerCache,
    batch: AttentionBatch,
    window: int | None,
    out: Tensor,
    capability: tuple[int, int],
    tile: Tile,
    block: int,
    few: int,
    programs: int,
    is_few: bool,
) -> None:
    """One pass over the sequences of few, or of many new tokens; `block` queries to a program."""
    _, kv_heads, page_size, head_dim = cache.keys.shape
    heads, group, sequences = query.shape[1], query.shape[1] // kv_heads, len(batch.context_lens)
    visible = batch.max_context_len if window is None else min(batch.max_context_len, window + block + tile.keys)
    rows = programs * block * heads
    wanted, parts = count_parts(programs * kv_heads, visible, rows * (head_dim + 1) * 4, tile.keys, is_few)
    sums, lse = out, out
    if parts > 1:
        sums, lse = (query.new_empty(rows * parts * width, dtype=torch.float32) for width in (head_dim, 1))
    keys, values, fp8 = cache.keys, cache.values, cache.key_scales is not None
    if fp8 and capability < (8, 9):
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
    exact = query.dtype == torch.float32 or triton.knobs.runtime.interpret  # which multiplies nothing but float32
    pad = max(16, triton.next_power_of_2(head_dim))
    _attention[programs, kv_heads, parts](
        query,
        keys,
        values,
        cache.key_scales,
        cache.value_scales,
        sums,
        lse,
        batch.query_starts,
        batch.context_lens,
        batch.block_tables,
        query.stride(0),
        batch.block_tables.stride(0),
        sequences,
        few,
        window or 0,
        wanted,
        PART_TOKENS,
        head_dim**-0.5 * math.log2(math.e),
        FEW=is_few,
        PARTS=parts > 1,
        WINDOW=window is not None,
        CODES=fp8,
        GROUP=group,
        KV_HEADS=kv_heads,
        PAGE=page_size,
        DIM=head_dim,
        PAD=pad,
        BLOCK_Q=block,
        BLOCK_M=max(tile.rows, triton.next_power_of_2(group)),
        BLOCK_N=tile.keys,
        DOT=tl.float32 if exact else tl.bfloat16,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if parts > 1:
        _combine[programs * block, heads](
            sums,
            lse,
            out,
            batch.query_starts,
            sequences,
            few,
            parts,
            FEW=is_few,
            BLOCK_Q=block,
            HEADS=heads,
            DIM=head_dim,
            PAD=pad,
            MAX_PARTS=MAX_PARTS if is_few else MANY_MAX_PARTS,
            num_warps=4,
        )


def count_parts(programs: int, visible: int, part_bytes: int, tile_keys: int, is_few: bool) -> tuple[int, int]:
    """Into how many parts contexts are cut: each sequence's at least, and the most that one may have.

    Host numbers alone, which are constant for a captured graph.

    Args:
        programs: if contexts are not cut.
        visible: keys of the longest.
        part_bytes: that one more part of all takes in memory.
    """
    wanted = max(1, PROGRAMS // programs)
    if is_few:
        most = min(max(wanted, -(-visible // PART_TOKENS)), MAX_PARTS, -(-visible // tile_keys))
    else:
        most = min(wanted, MANY_MAX_PARTS, -(-visible // LEAST_PART))
    parts = max(1, min(most, WORKSPACE // part_bytes))
    return min(wanted, parts), parts
