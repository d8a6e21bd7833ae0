"""A checkpoint that was never in a file: weights made on the device, slab by slab, as the loader asks for them.

They have the form that the precision keeps, so that the real loader packs them and nothing is quantised: 12 B weights
are there in seconds. Their size is such that activations stay of order one through all layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.checkpoint.layout import expected_tensors
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.quant.matrix import FloatMatrix, Fp8Matrix, GroupMatrix, Matrix
from engine.schemes import E4M3_MAX, INT4_GROUP, INT8_GROUP, Kept, Scheme

_CODE_SPREAD = 100.0  # standard deviation of e4m3 codes: the largest of a long row are near 448


class RandomCheckpoint:
    """`engine.model.load.TensorSource` without files.

    Args:
        dtype: of what is kept as floats.
        seed: of one generator; what it gives depends on the order of reading, and no figure on what it gives.
    """

    def __init__(
        self, config: ModelConfig, scheme: Scheme, dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> None:
        self._config, self._scheme = config, scheme
        self._dtype, self._device = dtype, device
        self._shapes = expected_tensors(config)
        self._generator = torch.Generator(device).manual_seed(seed)

    @property
    def config(self) -> ModelConfig:
        return self._config

    def read(self, name: str) -> Tensor:
        """Norms are ones, biases zeros."""
        shape = self._shape(name)
        return (torch.zeros if name.endswith(".bias") else torch.ones)(shape, device=self._device)

    def matrix(self, name: str, start: int = 0, stop: int | None = None) -> Matrix:
        outputs, inputs = self._shape(name)
        return self._random((outputs if stop is None else stop) - start, inputs, self._kept(name))

    def stored_bytes(self, name: str) -> int:
        return math.prod(self._shape(name)) * self._dtype.itemsize

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            raise CheckpointError(f"tensor {name} is not part of this model")
        return self._shapes[name]

    def _kept(self, name: str) -> Kept:
        if name == "model.embed_tokens.weight":
            return self._scheme.head if self._config.tie_word_embeddings else self._scheme.embedding
        if name == "lm_head.weight":
            return self._scheme.head
        return self._scheme.projection(name, self._config.num_layers)

    def _random(self, rows: int, inputs: int, kept: Kept) -> Matrix:
        spread = inputs**-0.5
        if kept in (Kept.FLOAT, Kept.STORED):
            return FloatMatrix(self._normal(rows, inputs) * spread)
        if kept is Kept.FP8:
            codes = (self._normal(rows, inputs) * _CODE_SPREAD).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
            return Fp8Matrix(codes, torch.full((rows, 1), spread / _CODE_SPREAD, device=self._device))
        bits, group = {Kept.INT4: (4, INT4_GROUP), Kept.INT6: (6, INT8_GROUP), Kept.INT8: (8, INT8_GROUP)}[kept]
        steps = 2**bits
        codes = torch.randint(1, steps, (rows, inputs), generator=self._generator, device=self._device)
        scales = torch.full((rows, inputs // group), spread * math.sqrt(12) / steps, device=self._device)
        return GroupMatrix(codes.to(torch.uint8), bits, group, scales, steps // 2 * scales)

    def _normal(self, rows: int, inputs: int) -> Tensor:
        return torch.randn(rows, inputs, generator=self._generator, dtype=self._dtype, device=self._device)
