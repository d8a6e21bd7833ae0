"""How a weight matrix is stored and multiplied: the second seam of the engine, beside `ops`.

A format is a class with `__call__` and `nbytes`, chosen once at load by `make_linear`. Dense formats so far:

- `PackedLinear`, CPU: oneDNN's own blocked layout, made once. Plain `F.linear` re-packs a bfloat16 weight on every call;
  packed, SmolLM2's matrices take 0.5 to 0.7 of the time at 1 to 16 rows and 0.95 at 512 (one core of a Zen 4).
- `DenseLinear`, anywhere: row-major weight and `F.linear`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

PACK_ROWS = 32  # the row count that oneDNN packs for; the layout it picks is as good from 1 to 512 rows (measured)


class Linear(Protocol):
    """y = x Wᵀ + b for x [rows, in_features]; x and y have the compute dtype, whatever the weight's own storage."""

    @property
    def nbytes(self) -> int:
        """Bytes that the weight (and bias) takes."""

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in_features] -> [rows, out_features]."""


class DenseLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight, self._bias = weight, bias
        self.nbytes = _nbytes(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._weight, self._bias)


class PackedLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.nbytes = _nbytes(weight, bias)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS)
        self._bias = bias
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._multiply(x, self._weight, self._bias, "none", [], "")
        return y


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The fastest dense format for the weight's device.

    Args:
        weight: [out_features, in_features], float32 or bfloat16, on its device; the caller gives it up.
        bias: [out_features] or None.
    """
    packs = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    return PackedLinear(weight, bias) if packs else DenseLinear(weight, bias)


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
