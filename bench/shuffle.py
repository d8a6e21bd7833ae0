"""The same function by other matrices: weights taken off the grid that a file has put them on.

A 4-bit file holds 16 numbers per group of 32 inputs. Quantised to 4 bits in groups of 32 again, they come out as they
went in, and the figure flatters. A decoder, though, does not depend on the order of its residual stream, nor on that of
a feed-forward layer's inner numbers, nor on the basis that a head's values are mixed in:

    W x = (W P)(Pᵀ x)        rows and columns of neighbouring matrices change places together, norms with them
    o_proj (Σ p v) = (o_proj Q)(Σ p Qᵀ v)        Q orthogonal, within each head

So groups are made of numbers from many old groups, each with a grid of its own, while every row keeps its distribution.
Rotating the residual stream too would be as exact, but is another model to quantise: the few channels that hold most of
its length are spread over all inputs, and the rounding of every weight is multiplied by them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.model.load import TensorSource
from engine.quant.matrix import FloatMatrix


class Shuffled:
    """A checkpoint whose matrices are another's, shuffled as above; always floats."""

    def __init__(self, checkpoint: TensorSource, seed: int = 0) -> None:
        self._checkpoint = checkpoint
        config = checkpoint.config
        generator = torch.Generator().manual_seed(seed)
        self._stream = torch.randperm(config.hidden_size, generator=generator)
        self._inner = torch.randperm(config.intermediate_size, generator=generator)
        noise = torch.randn(config.head_dim, config.head_dim, generator=generator, dtype=torch.float64)
        self._basis = torch.linalg.qr(noise).Q.float()
        self._last: tuple[str, Tensor] | None = None  # slabs of a matrix are asked for one after the other

    @property
    def config(self) -> ModelConfig:
        return self._checkpoint.config

    def stored_bytes(self, name: str) -> int:
        return self._checkpoint.stored_bytes(name)

    def read(self, name: str) -> Tensor:
        vector = self._checkpoint.read(name)
        if name.endswith("norm.weight"):
            return vector[self._stream]
        if name.endswith("v_proj.bias"):
            return torch.flatten(vector.float().view(-1, len(self._basis)) @ self._basis)
        return vector

    def matrix(self, name: str, start: int = 0, stop: int | None = None) -> FloatMatrix:
        if self._last is None or self._last[0] != name:
            self._last = name, self._shuffle(name, self._checkpoint.matrix(name).dequantise())
        return FloatMatrix(self._last[1][start:stop])

    def _shuffle(self, name: str, weight: Tensor) -> Tensor:
        head_dim, hidden = len(self._basis), len(self._stream)
        match name.split(".")[-2]:
            case "o_proj":
                return torch.flatten(weight[self._stream].view(hidden, -1, head_dim) @ self._basis, 1)
            case "down_proj":
                return weight[self._stream][:, self._inner]
            case "v_proj":
                return torch.flatten(self._basis.t() @ weight[:, self._stream].view(-1, head_dim, hidden), 0, 1)
            case "gate_proj" | "up_proj":
                return weight[:, self._stream][self._inner]
            case _:  # q_proj, k_proj, embed_tokens, lm_head
                return weight[:, self._stream]
