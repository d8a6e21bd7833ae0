"""How a weight matrix is stored and multiplied: the second seam of the engine, beside `ops`.

A format is a class with `__call__` and `nbytes`, chosen once at load by `make_linear`. Dense formats so far:

- `BlockedLinear`, bfloat16 on a CPU with bfloat16 dot products: our kernel. For SmolLM2's matrices on one core of a
  Zen 4 it takes 0.5 of oneDNN's time (weights prepacked) at 1 row, 0.75 at 16, 0.95 at 128, the same at 512.
- `PackedLinear`, other CPUs and float32: oneDNN's blocked layout, packed once; `F.linear` re-packs on every call, which
  doubles the time of few rows.
- `DenseLinear`, anywhere: row-major weight and `F.linear`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from engine.ops import Kernels

PACK_ROWS = 32  # the row count that oneDNN packs for; the layout it picks is as good from 1 to 512 rows (measured)
BLOCK = 64  # outputs that cpu_kernels.cpp computes at a time


class Linear(Protocol):
    """y = x Wᵀ + b for x [rows, in_features] in the compute dtype, whatever the weight's own storage.

    y has x's dtype; of a format made with `wide` it is float32.
    """

    @property
    def nbytes(self) -> int:
        """Bytes that the weight (and bias) takes."""

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in_features] -> [rows, out_features]."""


class DenseLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None = None, wide: bool = False) -> None:
        self._weight, self._bias = weight, bias
        # Only CUDA multiplies bfloat16 into float32; elsewhere the result is widened after its rounding.
        self._mixed = wide and weight.is_cuda and weight.dtype != torch.float32 and bias is None
        self._wide = wide
        self.nbytes = _nbytes(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        if self._mixed:
            return torch.mm(x, self._weight.t(), out_dtype=torch.float32)
        y = functional.linear(x, self._weight, self._bias)
        return y.float() if self._wide else y


class PackedLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None = None, wide: bool = False) -> None:
        self.nbytes = _nbytes(weight, bias)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS)
        self._bias = bias
        self._wide = wide
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._multiply(x, self._weight, self._bias, "none", [], "")
        return y.float() if self._wide else y


class BlockedLinear:
    """Weight as [out / 64, in / 2, 64, 2], padded with zeros: the same two inputs of 64 outputs lie side by side."""

    def __init__(self, weight: Tensor, bias: Tensor | None, wide: bool, kernels: Kernels) -> None:
        self._outputs, self._inputs = weight.shape
        padded = functional.pad(weight, (0, self._inputs % 2, 0, -self._outputs % BLOCK))
        self._weight = padded.view(-1, BLOCK, padded.shape[1] // 2, 2).transpose(1, 2).contiguous()
        self._bias = None if bias is None else bias.float()
        self._dtype = torch.float32 if wide else torch.bfloat16
        self._call = kernels.library.nemo_linear
        self._threads = kernels.threads
        self.nbytes = _nbytes(self._weight, self._bias)

    def __call__(self, x: Tensor) -> Tensor:
        if self._inputs % 2:
            x = functional.pad(x, (0, 1))
        out = torch.empty(len(x), self._outputs, dtype=self._dtype)
        self._call(
            self._dtype == torch.float32,
            x.data_ptr(),
            self._weight.data_ptr(),
            0 if self._bias is None else self._bias.data_ptr(),
            out.data_ptr(),
            *x.shape,
            self._outputs,
            self._threads,
        )
        return out

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the weight as it was given, so that an embedding tied to the head needs no copy of its own."""
        return self._weight[index // BLOCK, :, index % BLOCK].flatten(1)[:, : self._inputs]


def make_linear(
    weight: Tensor, bias: Tensor | None = None, *, kernels: Kernels | None = None, wide: bool = False
) -> Linear:
    """The fastest dense format for the weight's device and dtype.

    Args:
        weight: [out_features, in_features], float32 or bfloat16, on its device; the caller gives it up.
        bias: [out_features] or None.
        kernels: the engine's own, on a CPU that has them.
        wide: give float32 results. For the head: in bfloat16 its rounding makes ties of near ties.
    """
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return DenseLinear(weight, bias, wide)
    tiles = torch.cpu._is_amx_tile_supported()  # oneDNN has AMX kernels, which are several times faster from ~32 rows
    if kernels is not None and kernels.has_linear and weight.dtype == torch.bfloat16 and (wide or not tiles):
        return BlockedLinear(weight, bias, wide, kernels)
    return PackedLinear(weight, bias, wide)


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
