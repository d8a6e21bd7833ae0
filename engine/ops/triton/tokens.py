"""Rounding of whole tokens to e4m3, alone and at the end of other kernels. Reference: `reference.quantise_tokens`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.ops.interface import Quantised, Rounding
from engine.ops.triton.e4m3 import encode_e4m3, magnitude, scale_e4m3

NOT_ROUNDED: tl.constexpr = tl.constexpr(0)
OWN_SCALE: tl.constexpr = tl.constexpr(1)
ONE_SCALE: tl.constexpr = tl.constexpr(2)


@triton.jit
def store_token(y, out, scales, one_scale, token, width, column, ROUND: tl.constexpr, DTYPE: tl.constexpr):
    """A token's numbers, float32, as DTYPE or as codes of what DTYPE keeps of them: the same codes in one pass or two.

    Args:
        out: DTYPE or uint8 [T, width]; scales: float32 [T]; column: [BLOCK] >= width, where y is 0.
        ROUND: NOT_ROUNDED, OWN_SCALE, or ONE_SCALE, which is then `one_scale`.
    """
    where, mask = out + token * width + column, column < width
    if ROUND == NOT_ROUNDED:
        tl.store(where, y.to(DTYPE), mask=mask)
    else:
        y = y.to(DTYPE).to(tl.float32)
        scale = scale_e4m3(tl.max(tl.where(mask, magnitude(y), 0.0), axis=0)) if ROUND == OWN_SCALE else one_scale
        tl.store(scales + token, scale)
        tl.store(where, encode_e4m3(y * tl.div_rn(1.0, scale)), mask=mask)


@triton.jit
def _quantise(x, codes, scales, one_scale, width, ROUND: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    y = tl.load(x + token * width + column, mask=column < width, other=0.0).to(tl.float32)
    store_token(y, codes, scales, one_scale, token, width, column, ROUND, x.dtype.element_ty)


def quantise_tokens(x: Tensor, rounding: Rounding) -> Quantised:
    """x: [T, width], contiguous."""
    out = TokenOutput(x, x.shape[1], rounding)
    _quantise[len(x),](x, *out.arguments, x.shape[1], ROUND=out.round, BLOCK=out.block, num_warps=out.warps)
    return out.quantised


class TokenOutput:
    """Where `store_token` puts what a kernel makes of x, and how such a kernel is launched: one program for a token.

    All of a token is in the registers of its program, which for the 5,120 numbers of NeMo are 32 for each of 256
    threads, and for the 14,336 of its SwiGLU layer as many for each of 512. Traffic is what these kernels cost; more
    warps than that would wait for each other at the reduction.
    """

    def __init__(self, x: Tensor, width: int, rounding: Rounding | None) -> None:
        shape, self._dtype = (len(x), width), x.dtype
        self.block = triton.next_power_of_2(width)
        self.warps = min(max(self.block // 1024, 1), 16)
        self.tensor = torch.empty(shape, dtype=x.dtype if rounding is None else torch.uint8, device=x.device)
        scales = None if rounding is None else torch.empty(len(x), dtype=torch.float32, device=x.device)
        one_scale = 1.0 if rounding is None or rounding.scale is None else rounding.scale
        self.arguments = (self.tensor, scales, one_scale)
        if rounding is None:
            self.round = NOT_ROUNDED.value
        else:
            self.round = OWN_SCALE.value if rounding.scale is None else ONE_SCALE.value

    @property
    def quantised(self) -> Quantised:
        codes, scales, _ = self.arguments
        assert scales is not None
        return Quantised(codes.view(torch.float8_e4m3fn), scales, self._dtype)

    @property
    def result(self) -> Tensor | Quantised:
        return self.tensor if self.round == NOT_ROUNDED.value else self.quantised
