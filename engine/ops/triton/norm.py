"""Residual sum and RMSNorm, and the rounding of the result, in one pass. Reference: `ReferenceOps.add_rms_norm`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.ops.interface import Activations, Rounding
from engine.ops.triton.tokens import TokenOutput, store_token


@triton.jit
def _add_rms_norm(x, residual, weight, out, scales, one_scale, width, eps, ROUND: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    where = token * width + column
    total = tl.load(residual + where, mask=mask, other=0.0) + tl.load(x + where, mask=mask, other=0.0).to(tl.float32)
    tl.store(residual + where, total, mask=mask)
    inverse = tl.rsqrt(tl.sum(total * total, axis=0) / width + eps)
    y = total * inverse * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    store_token(y, out, scales, one_scale, token, width, column, ROUND, x.dtype.element_ty)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, rounding: Rounding | None = None
) -> Activations:
    """As `Ops.add_rms_norm`."""
    tokens, width = x.shape
    out = TokenOutput(x, width, rounding)
    _add_rms_norm[tokens,](
        x, residual, weight, *out.arguments, width, eps, ROUND=out.round, BLOCK=out.block, num_warps=out.warps
    )
    return out.result
