"""Activations of W8A8: each token's vector as e4m3 numbers and a scale."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.ops import Kernels
from engine.ops.cpu import DTYPES
from engine.schemes import E4M3_MAX, LEAST_SCALE


def quantise_rows(x: Tensor, scale: float | None, kernels: Kernels | None = None) -> tuple[Tensor, Tensor]:
    """x ≈ codes * scales.

    Args:
        x: [rows, width], float32 or bfloat16.
        scale: of a static scheme, for all rows; None = what brings each row's largest number to 448.

    Returns:
        codes [rows, width], numbers that e4m3 has, in x's dtype, which holds them exactly; scales float32 [rows].
    """
    if kernels is None:
        codes, scales = to_e4m3(x, scale)
        return codes.to(x.dtype), scales
    codes, scales = torch.empty_like(x), torch.empty(len(x))
    kernels.library.nemo_quantise_rows(
        DTYPES[x.dtype],
        x.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
        *x.shape,
        scale or 0.0,
        kernels.threads,
    )
    return codes, scales


def to_e4m3(x: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """The same with codes in float8_e4m3fn, as matrix units take them: the plain form, on any device."""
    x = x.float()
    if scale is None:
        scales = (x.abs().amax(dim=-1) / E4M3_MAX).clamp(min=LEAST_SCALE)
    else:
        scales = torch.full((len(x),), scale, device=x.device)
    codes = (x * scales.reciprocal().unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX)
    return codes.to(torch.float8_e4m3fn), scales
