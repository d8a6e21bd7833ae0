"""The kernels of `linear.py`: a program makes a tile of ROWS x COLUMNS, or what a split of the depth has in it."""

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
def _place(rows, outputs, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SWIZZLE: tl.constexpr):
    """This program's row and column block: SWIZZLE blocks of rows go through the columns side by side."""
    program = tl.program_id(0)
    row_blocks, column_blocks = tl.cdiv(rows, ROWS), tl.cdiv(outputs, COLUMNS)
    together = SWIZZLE * column_blocks
    first = program // together * SWIZZLE
    height = tl.minimum(row_blocks - first, SWIZZLE)
    return first + program % together % height, program % together // height


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
    SWIZZLE: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUPED: tl.constexpr,
    X_CODES: tl.constexpr,
    BIAS: tl.constexpr,
    DOT: tl.constexpr,
):
    """e4m3 codes [outputs, inputs]; scales float32 [groups, outputs]. `steps` of DEPTH inputs for each split."""
    row_block, block = _place(rows, outputs, ROWS, COLUMNS, SWIZZLE)
    row = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
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
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    SWIZZLE: tl.constexpr,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    DOT: tl.constexpr,
):
    """Codes in groups, [inputs, outputs]; scales and mins [groups, outputs]. SMALL: groups of 16 inputs, no more."""
    row_block, block = _place(rows, outputs, ROWS, COLUMNS, SWIZZLE)
    row = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < outputs  # a mask, not other columns instead: so the compiler sees whole lines
    r = tl.arange(0, DEPTH // 2)
    j = r % 16
    first = tl.program_id(1) * steps
    last = tl.minimum(first + steps, tl.cdiv(inputs, DEPTH))
    AFTER: tl.constexpr = (ROWS > 1) & (DEPTH == 32)  # of the product, scales are applied; its group is the step
    acc = tl.zeros((DEPTH // 2 if ROWS == 1 else ROWS, COLUMNS), tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        chunk = (step * (DEPTH // 32) + r // 16).to(tl.int64)
        known = (chunk * 32 < inputs)[:, None] & exists[None, :]
        low = chunk
        if BITS != 8:
            where = codes + (chunk * 16 + j)[:, None] * outputs + column[None, :]
            low = tl.load(where, mask=known, other=0)
        if AFTER:
            product = tl.zeros((ROWS, COLUMNS), tl.float32)
            mass = tl.zeros((ROWS,), tl.float32)
        for half in tl.static_range(2):
            k = chunk * 32 + half * 16 + j
            number = _numbers(low, codes, high, chunk, j, half, column, known, inputs, outputs, BITS)
            if ROWS == 1:
                given = tl.load(x + k, mask=k < inputs, other=0.0)[:, None]
            else:
                present = (row < rows)[:, None] & (k < inputs)[None, :]
                given = tl.load(x + row[:, None] * inputs + k[None, :], mask=present, other=0.0)
            if DEPTH == 32:  # half of it is in one group
                at = ((step * 32 + half * 16) // group).to(tl.int64) * outputs + column[None, :]
                of_known = exists[None, :]
            else:
                at = (k // group)[:, None] * outputs + column[None, :]
                of_known = known
            if AFTER:
                product = tl.dot(given.to(DOT), number.to(DOT), product, input_precision="ieee")
                mass += tl.sum(given.to(tl.float32), axis=1)
                if SMALL or half == 1:
                    acc += product * tl.load(scales + at, mask=of_known, other=0.0).to(tl.float32)
                    if BITS < 6:
                        acc -= mass[:, None] * tl.load(mins + at, mask=of_known, other=0.0).to(tl.float32)
                    product = tl.zeros((ROWS, COLUMNS), tl.float32)
                    mass = tl.zeros((ROWS,), tl.float32)
            else:
                number *= tl.load(scales + at, mask=of_known, other=0.0).to(tl.float32)
                if BITS < 6:
                    number -= tl.load(mins + at, mask=of_known, other=0.0).to(tl.float32)
                if ROWS == 1:
                    acc += number * given.to(tl.float32)
                else:
                    acc = tl.dot(given.to(DOT), number.to(DOT), acc, input_precision="ieee")
    total = tl.sum(acc, axis=0)[None, :] if ROWS == 1 else acc
    _finish(
        total, y, bias, scales, x, partial, arrived, rows, outputs, row, column, block,
        SPLITS, False, False, BIAS,
    )  # fmt: skip
