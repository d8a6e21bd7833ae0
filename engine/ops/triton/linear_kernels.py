"""The kernels of `linear.py`: a program makes ROWS x COLUMNS, all rows, or what a split of the depth has in it."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.ops.triton.e4m3 import decode_e4m3


@triton.jit
def _write(
    total,
    y,
    bias,
    scales,
    x_scales,
    rows,
    outputs,
    row,
    column,
    inside,
    COLUMN_SCALES: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    BIAS: tl.constexpr,
):
    if COLUMN_SCALES:
        total *= tl.load(scales + column)[None, :]
    if ROW_SCALES:
        total *= tl.load(x_scales + row, mask=row < rows, other=0.0)[:, None]
    if BIAS:
        total += tl.load(bias + column).to(tl.float32)[None, :]
    tl.store(y + row[:, None] * outputs + column[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _finish(
    total,
    y,
    bias,
    scales,
    x_scales,
    partial,
    arrived,
    rows,
    outputs,
    row,
    column,
    block,
    SPLITS: tl.constexpr,
    COLUMN_SCALES: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Stores float32 [ROWS, COLUMNS], after the sums of the other splits where there are any.

    Args:
        partial: float32 [SPLITS, rows, outputs]; arrived: int32, 0 for each block before and after.
    """
    inside = (row < rows)[:, None] & (column < outputs)[None, :]
    column = tl.where(column < outputs, column, 0)
    if SPLITS == 1:
        _write(total, y, bias, scales, x_scales, rows, outputs, row, column, inside, COLUMN_SCALES, ROW_SCALES, BIAS)
    else:
        where = partial + row[:, None] * outputs + column[None, :]
        tl.store(where + tl.program_id(1).to(tl.int64) * rows * outputs, total, mask=inside)
        tl.debug_barrier()  # every thread has stored before one of them tells so
        before = tl.atomic_add(arrived + block, 1, sem="acq_rel", scope="gpu")
        if before == SPLITS - 1:
            total = tl.zeros_like(total)
            for _ in range(SPLITS):
                total += tl.load(where, mask=inside, other=0.0, cache_modifier=".cg")
                where += rows.to(tl.int64) * outputs
            _write(
                total, y, bias, scales, x_scales, rows, outputs, row, column, inside, COLUMN_SCALES, ROW_SCALES, BIAS
            )
            tl.store(arrived + block, 0)


@triton.jit(do_not_specialize=["rows", "steps"])
def bytes_linear(
    x,
    x_scales,
    codes,
    scales,
    bias,
    y,
    partial,
    arrived,
    rows,
    outputs,
    inputs,
    group,
    steps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUPED: tl.constexpr,
    X_CODES: tl.constexpr,
    BIAS: tl.constexpr,
    DOT: tl.constexpr,
):
    """e4m3 codes [outputs, inputs]; scales float32 [groups, outputs]. `steps` of DEPTH inputs for each split."""
    block = tl.program_id(0)
    row = tl.arange(0, ROWS).to(tl.int64)
    column = block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    there = tl.where(column < outputs, column, 0)
    depth = tl.arange(0, DEPTH)
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, tl.cdiv(inputs, DEPTH))
    acc = tl.zeros((COLUMNS, DEPTH) if ROWS == 1 else (ROWS, COLUMNS), tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        k = step * DEPTH + depth
        stored = tl.load(codes + there[:, None] * inputs + k[None, :], mask=(k < inputs)[None, :], other=0.0)
        weight = decode_e4m3(stored, DOT)
        known = (row < rows)[:, None] & (k < inputs)[None, :]
        given = tl.load(x + row[:, None] * inputs + k[None, :], mask=known, other=0.0)
        if X_CODES:
            number = decode_e4m3(given, DOT)
            if given.dtype == tl.uint8:
                number = tl.where((given & 0x7F) == 0x7F, float("nan"), number)
            given = number
        if ROWS == 1:
            product = weight.to(tl.float32) * given.to(tl.float32)
            if GROUPED:
                product *= tl.load(scales + (step * DEPTH // group).to(tl.int64) * outputs + there)[:, None]
            acc += product
        elif GROUPED:
            product = tl.dot(given.to(DOT), tl.trans(weight), input_precision="ieee")
            acc += product * tl.load(scales + (step * DEPTH // group).to(tl.int64) * outputs + there)[None, :]
        else:
            acc = tl.dot(given.to(DOT), tl.trans(weight), acc, input_precision="ieee")
    total = tl.sum(acc, axis=1)[None, :] if ROWS == 1 else acc
    _finish(
        total, y, bias, scales, x_scales, partial, arrived, rows, outputs, row, column, block,
        SPLITS, not GROUPED, X_CODES, BIAS,
    )  # fmt: skip


@triton.jit
def _numbers(low, codes, high, chunk, j, half: tl.constexpr, column, known, inputs, outputs, BITS: tl.constexpr):
    """Codes of half a chunk of 32 inputs, less the code of zero, as float32 [16 * chunks, COLUMNS], where `known`."""
    i = half * 16 + j
    if BITS == 8:
        k = chunk * 32 + i
        q = tl.load(codes + k[:, None] * outputs + column[None, :], mask=known & (k < inputs)[:, None], other=128).to(
            tl.int32
        )
        zero = 128
    else:
        q = (low.to(tl.int32) >> (4 * half)) & 15
        zero = 0
    if BITS == 5:
        bits = tl.load(high + (chunk * 4 + i % 4)[:, None] * outputs + column[None, :], mask=known, other=0).to(
            tl.int32
        )
        q += ((bits >> (i // 4)[:, None]) & 1) * 16
    if BITS == 6:
        bits = tl.load(high + (chunk * 8 + i % 8)[:, None] * outputs + column[None, :], mask=known, other=0).to(
            tl.int32
        )
        q += ((bits >> (i // 8 * 2)[:, None]) & 3) * 16
        zero = 32
    return (q - zero).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "steps"])
def groups_linear(
    x,
    codes,
    high,
    scales,
    mins,
    bias,
    y,
    partial,
    arrived,
    rows,
    outputs,
    inputs,
    group,
    steps,
    BITS: tl.constexpr,
    SMALL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    DOT: tl.constexpr,
):
    """Codes in groups, [inputs, outputs]; scales and mins [groups, outputs]; a step is a chunk of 32 inputs.

    Args:
        SMALL: groups of 16 inputs, no more; else a step has one.
    """
    block = tl.program_id(0)
    row = tl.arange(0, ROWS).to(tl.int64)
    column = block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < outputs  # a mask, not other columns instead: so the compiler sees whole lines
    j = tl.arange(0, 16)
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, tl.cdiv(inputs, 32))
    UNITS: tl.constexpr = ROWS > 4
    acc = tl.zeros((ROWS, COLUMNS) if UNITS else (ROWS, 16, COLUMNS), tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        chunk = (step + tl.zeros_like(j)).to(tl.int64)
        known = (chunk * 32 < inputs)[:, None] & exists[None, :]
        low = chunk
        if BITS != 8:
            where = codes + (chunk * 16 + j)[:, None] * outputs + column[None, :]
            low = tl.load(where, mask=known, other=0)
        if UNITS:
            product = tl.zeros((ROWS, COLUMNS), tl.float32)
            mass = tl.zeros((ROWS,), tl.float32)
        for half in tl.static_range(2):
            k = chunk * 32 + half * 16 + j
            number = _numbers(low, codes, high, chunk, j, half, column, known, inputs, outputs, BITS)
            present = (row < rows)[:, None] & (k < inputs)[None, :]
            given = tl.load(x + row[:, None] * inputs + k[None, :], mask=present, other=0.0)
            at = ((step * 32 + half * 16) // group).to(tl.int64) * outputs + column[None, :]
            if UNITS:
                product = tl.dot(given.to(DOT), number.to(DOT), product, input_precision="ieee")
                mass += tl.sum(given.to(tl.float32), axis=1)
                if SMALL or half == 1:
                    acc += product * tl.load(scales + at, mask=exists[None, :], other=0.0).to(tl.float32)
                    if BITS < 6:
                        acc -= mass[:, None] * tl.load(mins + at, mask=exists[None, :], other=0.0).to(tl.float32)
                    product = tl.zeros((ROWS, COLUMNS), tl.float32)
                    mass = tl.zeros((ROWS,), tl.float32)
            else:
                number *= tl.load(scales + at, mask=exists[None, :], other=0.0).to(tl.float32)
                if BITS < 6:
                    number -= tl.load(mins + at, mask=exists[None, :], other=0.0).to(tl.float32)
                acc += number[None, :, :] * given.to(tl.float32)[:, :, None]
    total = acc if UNITS else tl.sum(acc, axis=1)
    _finish(
        total, y, bias, scales, x, partial, arrived, rows, outputs, row, column, block,
        SPLITS, False, False, BIAS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["start"])
def decode_bytes(codes, scales, out, start, inputs, outputs, group, GROUPED: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers [_, inputs] of the rows from `start` on, a program for BLOCK of one row. Codes as of `bytes_linear`."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inputs
    stored = tl.load(codes + (start + row) * inputs + column, mask=inside, other=0.0)
    scale = scales + start + row
    if GROUPED:
        number = decode_e4m3(stored, tl.float32) * tl.load(
            scale + (column // group).to(tl.int64) * outputs, mask=inside, other=0.0
        )
    else:
        number = decode_e4m3(stored, tl.float32) * tl.load(scale)
    tl.store(out + row * inputs + column, number.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["start", "width"])
def decode_groups(
    codes,
    high,
    scales,
    mins,
    out,
    start,
    width,
    inputs,
    outputs,
    group,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Numbers [inputs, width] of the columns from `start` on. Codes as of `groups_linear`, whose rows are inputs."""
    j = tl.arange(0, 16)
    chunk = (tl.program_id(0) + tl.zeros_like(j)).to(tl.int64)
    place = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = place < width
    column = (start + place).to(tl.int64)
    known = (chunk * 32 < inputs)[:, None] & exists[None, :]
    low = chunk
    if BITS != 8:
        low = tl.load(codes + (chunk * 16 + j)[:, None] * outputs + column[None, :], mask=known, other=0)
    for half in tl.static_range(2):
        k = chunk * 32 + half * 16 + j
        number = _numbers(low, codes, high, chunk, j, half, column, known, inputs, outputs, BITS)
        at = (k // group)[:, None] * outputs + column[None, :]
        number *= tl.load(scales + at, mask=known, other=0.0).to(tl.float32)
        if BITS < 6:
            number -= tl.load(mins + at, mask=known, other=0.0).to(tl.float32)
        inside = known & (k < inputs)[:, None]
        tl.store(out + k[:, None] * width + place[None, :], number.to(out.dtype.element_ty), mask=inside)
