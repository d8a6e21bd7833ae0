"""Activations of W8A8: each token's vector as e4m3 numbers and a scale."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.ops import Kernels, Rounding
from engine.ops.cpu import DTYPES
from engine.ops.reference import quantise_tokens


def quantise_rows(x: Tensor, scale: float | None, kernels: Kernels | None = None) -> tuple[Tensor, Tensor]:
    """x ≈ codes * scales.

    Args:
        x: [rows, width], float32 or bfloat16.
        scale: of a static scheme, for all rows; None = what brings each row's largest number to 448.

    Returns:
        codes [rows, width], numbers that e4m3 has, in x's dtype, which holds them exactly; scales float32 [rows].
    """
    if kernels is None:
        quantised = quantise_tokens(x, Rounding(scale))
        return quantised.codes.to(x.dtype), quantised.scales
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
