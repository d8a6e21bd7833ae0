"""float8_e4m3fn by integer arithmetic, for kernels: the same bits on every card and in Triton's interpreter.

Triton converts to e4m3 from compute capability 8.9 on only, and its interpreter drops the carry of a rounding. A code
is 1 sign, 4 exponent (bias 7) and 3 mantissa bits; 0x7E is 448, the largest number, 0x7F none (arXiv 2209.05433).
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.schemes import E4M3_MAX, LEAST_SCALE

LARGEST: tl.constexpr = tl.constexpr(E4M3_MAX)
LEAST: tl.constexpr = tl.constexpr(LEAST_SCALE)


@triton.jit
def scale_e4m3(largest):
    """Scales of vectors from the largest magnitude of each, float32: NaN where that is infinite (see `magnitude`)."""
    scale = tl.maximum(tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32)), LEAST)
    return tl.where(largest < float("inf"), scale, float("nan"))


@triton.jit
def magnitude(x):
    """|x|, and infinity for NaN, which a maximum would pass over."""
    size = tl.abs(x)
    return tl.where(size < float("inf"), size, float("inf"))


@triton.jit
def encode_e4m3(x):
    """float32 -> uint8, rounded to nearest even, saturated at 448; NaN is 0x7F."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Normal numbers, from 2 ** -6 on: 20 of 23 mantissa bits are rounded away, the exponent's bias goes from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below, steps of 2 ** -9: the last mantissa bit of a number near 2 ** 14, so that adding it rounds.
    steps = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, steps, tl.minimum(normal, 0x7E))
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def decode_e4m3(codes, DTYPE: tl.constexpr):
    """uint8 bits or float8e4nv -> DTYPE (bfloat16, float16 or float32), exactly; as bits, 0x7F becomes 480.

    Moved to the exponent's place of a bfloat16, the bits are the number times 2 ** (7 - 127).
    """
    if codes.dtype == tl.uint8:
        wide = codes.to(tl.uint32)
        bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
        return (bits.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(DTYPE)
    # By way of float32: Triton would go from float16 to bfloat16, for which sm_89 has no instruction.
    return codes.to(tl.float32).to(DTYPE) if tl.bfloat16 == DTYPE else codes.to(DTYPE)
