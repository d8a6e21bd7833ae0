"""How weights are coded in memory: what every slab of a matrix, and every fused neighbour, has in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.quant.matrix import FloatMatrix, Fp8Matrix, Matrix

# Inputs per scale: there float32 would weigh too much, and most scales of GGUF are float16. Those of K-quants are the
# product of a float16 and six or seven bits, and are rounded. Measured on SmolLM2-135M: with Q4_K this costs a KL
# divergence of 3e-5, quantising itself 7e-2. Two levels of scales would be exact, in 4.6 instead of 5 bits per weight.
_HALF_SCALES_UP_TO = 64


@dataclass(frozen=True, slots=True)
class Form:
    """What two matrices must have in common to be one in memory.

    Attributes:
        bits: of a code: 4, 5, 6, 8; 0 for e4m3; 16 for bfloat16.
        group: inputs per scale; 0 = a row.
        input_scale: of static activation quantisation, for FP8.
    """

    bits: int
    group: int
    input_scale: float | None = None

    @classmethod
    def of(cls, matrix: Matrix) -> Form:
        if isinstance(matrix, FloatMatrix):
            return cls(16, 0)
        if isinstance(matrix, Fp8Matrix):
            return cls(0, matrix.block or 0, matrix.input_scale)
        return cls(matrix.bits, 0 if matrix.group == matrix.codes.shape[1] else matrix.group)

    @property
    def has_mins(self) -> bool:
        """Formats of 4 and 5 bits have a minimum of their own per group; the wider ones are symmetric about `zero`."""
        return self.bits in (4, 5)

    @property
    def zero(self) -> float:
        """The code of weight 0 in a symmetric format. Signed bytes and e4m3 are kept as numbers, so there it is 0."""
        return 32.0 if self.bits == 6 else 0.0

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float16 if 0 < self.group <= _HALF_SCALES_UP_TO else torch.float32

    def groups(self, inputs: int) -> int:
        return -(-inputs // self.group) if self.group else 1

    def nbytes(self, outputs: int, inputs: int, float_bytes: int) -> int:
        """Bytes of a matrix of this shape. Blocks that it does not fill, and a bias, are not counted.

        Args:
            float_bytes: of the compute dtype, which floats are kept in.
        """
        if self.bits == 16:
            return outputs * inputs * float_bytes
        scale_bytes = self.scale_dtype.itemsize * (2 if self.has_mins else 1)
        return outputs * (inputs * (self.bits or 8) // 8 + self.groups(inputs) * scale_bytes)
