"""SwiGLU's product, and the rounding of the result, in one pass. Reference: `ReferenceOps.silu_mul`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.ops.interface import Activations, Rounding
from engine.ops.triton.tokens import TokenOutput, store_token


@triton.jit
def _silu_mul(gate_up, out, scales, one_scale, width, ROUND: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    first = gate_up + token * 2 * width + column
    gate = tl.load(first, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(first + width, mask=mask, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    store_token(y, out, scales, one_scale, token, width, column, ROUND, gate_up.dtype.element_ty)


def silu_mul(gate_up: Tensor, rounding: Rounding | None = None) -> Activations:
    """As `Ops.silu_mul`."""
    tokens, width = len(gate_up), gate_up.shape[1] // 2
    out = TokenOutput(gate_up, width, rounding)
    _silu_mul[tokens,](gate_up, *out.arguments, width, ROUND=out.round, BLOCK=out.block, num_warps=out.warps)
    return out.result
