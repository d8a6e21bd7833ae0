"""The next token of every row over a whole vocabulary, without a sort. Reference: `engine.sampling.reference.chosen`.

    peaks    a program per 4,096 logits    largest of it, where it is, largest of each 128
    weigh    a program per 4,096 logits    Σ exp((logit - peak) / temperature); which tokens may be left, one by one
    choose   a program per row             the cut, by bisection among those; the draw

A token's rank is its logit as an integer in the same order (`engine.sampling.order`), so that a bisection ends at the
very logit where top_k or top_p cuts, in at most 32 passes over what may be left: some hundred tokens for most rows. Of
equals at the cut the first ids stay. Sums have a fixed order: the same row draws the same token beside any others.
Everything that differs from row to row is read on the device, and no number of tokens is asked for by the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.limits import CHOICE_CHUNK

CHUNK: tl.constexpr = tl.constexpr(CHOICE_CHUNK)
BLOCK: tl.constexpr = tl.constexpr(128)  # whose largest bound what top_k leaves from below, up to top_k = 1,024
WARPS = 8
PARAMETERS = 4  # of a row: temperature (0 = greedy), top_k (0 = all), top_p, min_p


@triton.jit
def _key(x):
    """float32 -> int32 in the same order; its own inverse, but for -0.0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _logit(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _mix(value):
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@triton.jit
def _uniform(mixed_seed, position):
    """`engine.sampling.draw.uniform`, of a seed that is mixed already."""
    step = (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    return (_mix(mixed_seed.to(tl.uint64, bitcast=True) + step) >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _peak(chunk_peaks, row, CHUNKS: tl.constexpr, PADDED: tl.constexpr):
    """The largest logit of a row; NaN where any is."""
    chunk = tl.arange(0, PADDED)
    peaks = tl.load(chunk_peaks + row * CHUNKS + chunk, mask=chunk < CHUNKS, other=float("-inf"))
    bad = tl.max((peaks != peaks).to(tl.int32), axis=0)
    return tl.where(bad > 0, float("nan"), tl.max(tl.where(peaks == peaks, peaks, float("-inf")), axis=0))


@triton.jit
def _peaks(logits, chunk_peaks, chunk_tokens, block_peaks, vocab, CHUNKS: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * vocab + token, mask=token < vocab, other=float("-inf"))
    bad = tl.max((x != x).to(tl.int32), axis=0)
    x = tl.where(x == x, x, float("-inf"))
    peak = tl.max(x, axis=0)
    tl.store(chunk_peaks + row * CHUNKS + chunk, tl.where(bad > 0, float("nan"), peak))
    tl.store(chunk_tokens + row * CHUNKS + chunk, tl.min(tl.where(x == peak, token, vocab), axis=0))
    block = tl.arange(0, CHUNK // BLOCK)
    of_blocks = tl.max(tl.reshape(x, (CHUNK // BLOCK, BLOCK)), axis=1)
    tl.store(block_peaks + (row * CHUNKS + chunk) * (CHUNK // BLOCK) + block, of_blocks)


@triton.jit(do_not_specialize_on_alignment=["rows"])
def _weigh(
    logits,
    rows,
    parameters,
    chunk_peaks,
    block_peaks,
    chunk_sums,
    left_logits,
    left_tokens,
    left_counts,
    vocab,
    CHUNKS: tl.constexpr,
    PADDED: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    own = parameters + tl.load(rows + row) * 4
    temperature, top_k = tl.load(own).to(tl.float32), tl.load(own + 1).to(tl.int32)
    top_p, min_p = tl.load(own + 2), tl.load(own + 3)
    if temperature > 0:
        peak = _peak(chunk_peaks, row, CHUNKS, PADDED)
        index = tl.arange(0, CHUNK)
        token = chunk * CHUNK + index
        x = tl.load(logits + row * vocab + token, mask=token < vocab, other=float("-inf"))
        weight = tl.exp((x - peak) / temperature)
        tl.store(chunk_sums + row * CHUNKS + chunk, tl.sum(weight, axis=0))
        if (top_k > 0) | (top_p < 1) | (min_p > 0):
            BLOCKS: tl.constexpr = PADDED * (CHUNK // BLOCK)
            least_weight, least_key = min_p.to(tl.float32) * 0.999, tl.full((), -(2**31), tl.int64)
            if (top_k > 0) & (top_k < vocab):
                # top_k of the blocks have a logit as large as the largest of the last of them, so the cut is not below.
                block = tl.arange(0, BLOCKS)
                mask = block < CHUNKS * (CHUNK // BLOCK)
                of_blocks = tl.load(
                    block_peaks + row * CHUNKS * (CHUNK // BLOCK) + block, mask=mask, other=float("-inf")
                )
                keys = tl.where(mask, _key(of_blocks).to(tl.int64), -(2**31))
                least_weight = 0.0
                above = _key(peak).to(tl.int64) + 1  # fewer than top_k from here on
                while above - least_key > 1:
                    middle = (above + least_key) >> 1
                    enough = tl.sum((keys >= middle).to(tl.int32), axis=0) >= top_k
                    least_key = tl.where(enough, middle, least_key)
                    above = tl.where(enough, above, middle)
            elif top_p < 1:
                # All that weigh less are together less than 1 - top_p of the sum, which is 1 or more.
                least_weight = ((1 - top_p) / vocab).to(tl.float32) * 0.5
            may = (token < vocab) & (weight >= least_weight) & (_key(x).to(tl.int64) >= least_key)
            place = (row * CHUNKS + chunk) * CHUNK + tl.cumsum(may.to(tl.int32), axis=0) - 1
            tl.store(left_logits + place, x, mask=may)
            tl.store(left_tokens + place, token, mask=may)
            tl.store(left_counts + row * CHUNKS + chunk, tl.sum(may.to(tl.int32), axis=0))


@triton.jit
def _above(left_logits, counts, most, where, key, peak, temperature, WIDTH: tl.constexpr):
    """How many tokens rank above a key, and their weight, float64."""
    number, mass = tl.zeros((), tl.int32), tl.zeros((), tl.float64)
    for start in range(0, most, WIDTH):
        index = start + tl.arange(0, WIDTH)
        mask = index[None, :] < counts[:, None]
        x = tl.load(left_logits + where[:, None] + index[None, :], mask=mask, other=float("-inf"))
        over = mask & (_key(x).to(tl.int64) > key)
        number += tl.sum(tl.sum(over.to(tl.int32), axis=1), axis=0)
        mass += tl.sum(tl.sum(tl.where(over, tl.exp((x - peak) / temperature), 0.0), axis=1), axis=0).to(tl.float64)
    return number, mass


@triton.jit
def _invert(weights, target):
    """Where running sums pass `target`, never at a weight of nothing; and what comes before it. [N], float64."""
    index = tl.arange(0, weights.shape[0])
    sums = tl.cumsum(weights, axis=0)
    some = weights > 0
    last = tl.max(tl.where(some, index, 0), axis=0)
    found = tl.minimum(tl.min(tl.where(some & (sums > target), index, weights.shape[0]), axis=0), last)
    return found, tl.sum(tl.where(index < found, weights, 0.0), axis=0)


@triton.jit(do_not_specialize_on_alignment=["rows", "positions"])  # two rows of one tensor: of any
def _choose(
    logits,
    rows,
    parameters,
    mixed_seeds,
    positions,
    chunk_peaks,
    chunk_tokens,
    chunk_sums,
    left_logits,
    left_tokens,
    left_counts,
    peaks,
    tokens,
    vocab,
    CHUNKS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    own_row = tl.load(rows + row)
    own = parameters + own_row * 4
    temperature, top_k = tl.load(own).to(tl.float32), tl.load(own + 1).to(tl.int32)
    top_p, min_p = tl.load(own + 2), tl.load(own + 3)
    peak = _peak(chunk_peaks, row, CHUNKS, PADDED)
    tl.store(peaks + row, peak)

    chunk = tl.arange(0, PADDED)
    real = chunk < CHUNKS
    largest = tl.load(chunk_peaks + row * CHUNKS + chunk, mask=real, other=float("-inf"))
    first = tl.load(chunk_tokens + row * CHUNKS + chunk, mask=real, other=vocab)
    token = tl.min(tl.where(real & (largest == peak), first, vocab), axis=0)
    if (temperature > 0) & (tl.abs(peak) < float("inf")):
        u = _uniform(tl.load(mixed_seeds + own_row), tl.load(positions + row))
        index = tl.arange(0, CHUNK)
        sums = tl.load(chunk_sums + row * CHUNKS + chunk, mask=real, other=0.0).to(tl.float64)
        whole = tl.sum(sums, axis=0)
        truncated = (top_k > 0) | (top_p < 1) | (min_p > 0)
        cut, ties = tl.full((), -(2**31), tl.int64), tl.full((), 2**30, tl.int32)
        counts, equals_before = tl.zeros((PADDED,), tl.int32), tl.zeros((PADDED,), tl.int32)
        if truncated:
            counts = tl.load(left_counts + row * CHUNKS + chunk, mask=real, other=0)
            most = tl.max(counts, axis=0)
            where = (row * CHUNKS + chunk) * CHUNK
            if (top_k > 0) & (top_k < vocab):
                low, cut = cut - 1, _key(peak).to(tl.int64)
                number, mass = tl.zeros((), tl.int32), tl.zeros((), tl.float64)  # of what ranks above the cut
                while cut - low > 1:
                    middle = (cut + low) >> 1
                    found, weight = _above(left_logits, counts, most, where, middle, peak, temperature, WIDTH)
                    fewer = found < top_k
                    cut, low = tl.where(fewer, middle, cut), tl.where(fewer, low, middle)
                    number, mass = tl.where(fewer, found, number), tl.where(fewer, weight, mass)
                ties = top_k - number
                whole = mass + ties * tl.exp((_logit(cut) - peak) / temperature).to(tl.float64)
            if top_p < 1:
                share = top_p * whole
                low, nucleus, mass = cut - 1, _key(peak).to(tl.int64), tl.zeros((), tl.float64)
                while nucleus - low > 1:
                    middle = (nucleus + low) >> 1
                    _, found = _above(left_logits, counts, most, where, middle, peak, temperature, WIDTH)
                    less = found < share
                    nucleus, low = tl.where(less, middle, nucleus), tl.where(less, low, middle)
                    mass = tl.where(less, found, mass)
                each = tl.exp((_logit(nucleus) - peak) / temperature).to(tl.float64)
                needed = tl.maximum(tl.ceil(tl.minimum((share - mass) / each, 1e9)).to(tl.int32), 1)
                ties = tl.where(nucleus == cut, tl.minimum(ties, needed), needed)
                cut = nucleus

            # Equals of the cut in the chunks before each, then the weight that each chunk has left.
            equals = tl.zeros((PADDED,), tl.int32)
            for start in range(0, most, WIDTH):
                j = start + tl.arange(0, WIDTH)
                mask = j[None, :] < counts[:, None]
                x = tl.load(left_logits + where[:, None] + j[None, :], mask=mask, other=float("-inf"))
                equals += tl.sum((mask & (_key(x).to(tl.int64) == cut)).to(tl.int32), axis=1)
            equals_before = tl.cumsum(equals, axis=0) - equals
            seen, sums = equals_before, tl.zeros((PADDED,), tl.float64)
            for start in range(0, most, WIDTH):
                j = start + tl.arange(0, WIDTH)
                mask = j[None, :] < counts[:, None]
                x = tl.load(left_logits + where[:, None] + j[None, :], mask=mask, other=float("-inf"))
                equal = mask & (_key(x).to(tl.int64) == cut)
                rank = seen[:, None] + tl.cumsum(equal.to(tl.int32), axis=1)
                stays = mask & ((_key(x).to(tl.int64) > cut) | (equal & (rank <= ties)))
                weights = tl.exp((x - peak) / temperature)
                sums += tl.sum(tl.where(stays & (weights >= min_p), weights, 0.0), axis=1).to(tl.float64)
                seen += tl.sum(equal.to(tl.int32), axis=1)

        target = u * tl.sum(sums, axis=0)
        at, before = _invert(sums, target)
        if truncated:
            count = tl.sum(tl.where(chunk == at, counts, 0), axis=0)
            x = tl.load(left_logits + (row * CHUNKS + at) * CHUNK + index, mask=index < count, other=float("-inf"))
            equal = (index < count) & (_key(x).to(tl.int64) == cut)
            rank = tl.sum(tl.where(chunk == at, equals_before, 0), axis=0) + tl.cumsum(equal.to(tl.int32), axis=0)
            stays = (index < count) & ((_key(x).to(tl.int64) > cut) | (equal & (rank <= ties)))
            weights = tl.exp((x - peak) / temperature)
            weights = tl.where(stays & (weights >= min_p), weights, 0.0)
        else:
            there = at * CHUNK + index
            x = tl.load(logits + row * vocab + there, mask=there < vocab, other=float("-inf"))
            weights = tl.exp((x - peak) / temperature)
        inside, _ = _invert(weights.to(tl.float64), target - before)
        token = at * CHUNK + inside
        if truncated:
            token = tl.load(left_tokens + (row * CHUNKS + at) * CHUNK + inside)
    tl.store(tokens + row, tl.minimum(token, vocab - 1).to(tl.int64))


def choose(
    logits: Tensor, rows: Tensor, positions: Tensor, parameters: Tensor, mixed_seeds: Tensor
) -> tuple[Tensor, Tensor]:
    """The largest logit and the next token of each of S rows.

    Args:
        logits: float32 [S, V], contiguous.
        rows: int64 [S], which row of `parameters` and `mixed_seeds` is meant.
        positions: int64 [S], where each token will stand.
        parameters: float64 [R, PARAMETERS].
        mixed_seeds: int64 [R], the bits of `engine.sampling.draw.mix` of each seed.

    Returns:
        float32 [S] and int64 [S]. A row without a finite largest logit gets some token; the caller knows it has failed.
    """
    size, vocab = logits.shape
    chunk, chunks = CHUNK.value, triton.cdiv(vocab, CHUNK.value)
    padded = triton.next_power_of_2(chunks)

    def scratch(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    peaks, tokens = scratch(size, dtype=torch.float32), scratch(size, dtype=torch.int64)
    chunk_peaks, chunk_sums = (scratch(size, chunks, dtype=torch.float32) for _ in range(2))
    chunk_tokens, left_counts = (scratch(size, chunks, dtype=torch.int32) for _ in range(2))
    block_peaks = scratch(size, chunks * (chunk // BLOCK.value), dtype=torch.float32)
    left_logits = scratch(size, chunks * chunk, dtype=torch.float32)
    left_tokens = scratch(size, chunks * chunk, dtype=torch.int32)
    left = (left_logits, left_tokens, left_counts)
    sizes = {"CHUNKS": chunks, "num_warps": WARPS}
    _peaks[size, chunks](logits, chunk_peaks, chunk_tokens, block_peaks, vocab, **sizes)
    _weigh[size, chunks](
        logits, rows, parameters, chunk_peaks, block_peaks, chunk_sums, *left, vocab, PADDED=padded, **sizes
    )
    width = max(chunk // padded, 16)
    _choose[size,](
        logits, rows, parameters, mixed_seeds, positions, chunk_peaks, chunk_tokens, chunk_sums, *left, peaks, tokens,
        vocab, PADDED=padded, WIDTH=width, **sizes,
    )  # fmt: skip
    return peaks, tokens
