"""How a weight matrix is stored and multiplied: the second seam of the engine, beside `ops`.

A format is a class that is filled with a matrix once, slab by slab, and then called. `engine.quant.build` chooses:

- `BlockedLinear` (blocked.py), bfloat16 and all coded weights on a CPU: our kernel.
- `PackedLinear`, float32 on a CPU: oneDNN's blocked layout, packed once; `F.linear` re-packs on every call, which
  doubles the time of few rows. Also bfloat16 where the CPU has matrix tiles (AMX), which oneDNN knows to use.
- `CodedLinear` (coded.py), coded weights on a GPU, or on a CPU without a compiler.
- `DenseLinear`, anywhere: row-major weight and `F.linear`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from engine.ops import Activations, Rounding, floats

PACK_ROWS = 32  # the row count that oneDNN packs for; the layout it picks is as good from 1 to 512 rows (measured)


class Linear(Protocol):
    """y = x Wᵀ + b for x [rows, in_features] in the compute dtype, whatever the weight's own storage.

    y has x's dtype; of a format made with `wide` it is float32.
    """

    @property
    def rounding(self) -> Rounding | None:
        """How x is best rounded by who makes it, in one pass; None = not at all. Floats are always understood."""

    @property
    def nbytes(self) -> int:
        """Bytes that the weight (and bias) takes."""

    def __call__(self, x: Activations) -> Tensor:
        """[rows, in_features] -> [rows, out_features]."""


class Table(Protocol):
    """An embedding: rows of a matrix by their number."""

    def rows(self, index: Tensor) -> Tensor:
        """int64 [n] -> [n, width], in whatever float type the table is kept or decoded to."""


class DenseLinear:
    """weight: [out_features, in_features], float32 or bfloat16, on its device; bias: [out_features] or None."""

    rounding = None

    def __init__(self, weight: Tensor, bias: Tensor | None = None, wide: bool = False) -> None:
        self._weight, self._bias = weight, bias
        # Only CUDA multiplies bfloat16 into float32; elsewhere the result is widened after its rounding.
        self._mixed = wide and weight.is_cuda and weight.dtype != torch.float32 and bias is None
        self._wide = wide
        self.nbytes = nbytes(weight, bias)

    def __call__(self, x: Activations) -> Tensor:
        x = floats(x)
        if self._mixed:
            return torch.mm(x, self._weight.t(), out_dtype=torch.float32)
        y = functional.linear(x, self._weight, self._bias)
        return y.float() if self._wide else y

    def rows(self, index: Tensor) -> Tensor:
        return self._weight[index]


class PackedLinear:
    """The arguments of DenseLinear; the row-major weight is given up."""

    rounding = None

    def __init__(self, weight: Tensor, bias: Tensor | None = None, wide: bool = False) -> None:
        self.nbytes = nbytes(weight, bias)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS)
        self._bias = bias
        self._wide = wide
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Activations) -> Tensor:
        y: Tensor = self._multiply(floats(x), self._weight, self._bias, "none", [], "")
        return y.float() if self._wide else y


class JoinedLinear:
    """Several maps over the same input, their outputs side by side: fused projections that are stored differently."""

    def __init__(self, parts: list[Linear]) -> None:
        self._parts = parts
        roundings = {part.rounding for part in parts}
        self.rounding = roundings.pop() if len(roundings) == 1 else None
        self.nbytes = sum(part.nbytes for part in parts)

    def __call__(self, x: Activations) -> Tensor:
        return torch.cat([part(x) for part in self._parts], dim=-1)


def nbytes(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
