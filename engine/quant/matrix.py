"""What a file says about one weight matrix: its numbers as stored, and the scales that make them weights.

Every reader of checkpoints normalises its dialect to one of these three forms; `make_linear` decides what is kept in
memory. A form is data on the CPU and knows how to become floats, slowly: that is the reference of every format.

    FloatMatrix    values                                                 safetensors, GGUF F32 / F16 / BF16
    Fp8Matrix      codes (e4m3) · scales, per row or per block            FP8 checkpoints of every publisher
    GroupMatrix    codes (unsigned) · scales - mins, per group of inputs  GGUF Q4_0 … Q6_K, Q8_0; our int8 and int4
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class FloatMatrix:
    """values: float32, float16 or bfloat16 [outputs, inputs]."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self.values.shape
        return outputs, inputs

    def dequantise(self) -> Tensor:
        """float32 [outputs, inputs]."""
        return self.values.float()


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """weight = codes * scales.

    Attributes:
        codes: float8_e4m3fn [outputs, inputs].
        scales: float32 [outputs, ceil(inputs / block)], or [outputs, 1] where one scale serves a row. A reader repeats
            the scale of a tensor, or of a block of rows, for each row: fusing matrices then loses nothing.
        block: inputs that share a scale; None = all of a row.
        input_scale: of static activation quantisation, x ≈ code * input_scale; None = dynamic, per token.
    """

    codes: Tensor
    scales: Tensor
    block: int | None = None
    input_scale: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self.codes.shape
        return outputs, inputs

    def dequantise(self) -> Tensor:
        """float32 [outputs, inputs]."""
        if self.block is None:
            return self.codes.float() * self.scales
        return self.codes.float() * self.scales.repeat_interleave(self.block, 1)[:, : self.codes.shape[1]]


@dataclass(frozen=True, slots=True)
class GroupMatrix:
    """weight[o, i] = codes[o, i] * scales[o, i // group] - mins[o, i // group].

    Attributes:
        codes: uint8 [outputs, inputs], each below 2 ** bits.
        bits: 4, 5, 6 or 8.
        group: inputs that share a scale; inputs is a multiple of it.
        scales, mins: float32 [outputs, inputs / group]. Symmetric formats store q + zero, so mins = zero * scales.
    """

    codes: Tensor
    bits: int
    group: int
    scales: Tensor
    mins: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self.codes.shape
        return outputs, inputs

    def dequantise(self) -> Tensor:
        """float32 [outputs, inputs]."""
        grouped = self.codes.view(len(self.codes), -1, self.group).float()
        return torch.flatten(grouped * self.scales.unsqueeze(-1) - self.mins.unsqueeze(-1), 1)


Matrix = FloatMatrix | Fp8Matrix | GroupMatrix


def concat(pieces: Sequence[Matrix]) -> Matrix:
    """Rows of several matrices of one form, one after the other."""
    if len(pieces) == 1:
        return pieces[0]
    first = pieces[0]

    def joined(field: str) -> Tensor:
        found = [getattr(piece, field) for piece in pieces]
        if found[0].dtype != torch.float8_e4m3fn:
            return torch.cat(found)
        return torch.cat([each.view(torch.uint8) for each in found]).view(found[0].dtype)  # CUDA joins no float8

    if isinstance(first, FloatMatrix):
        return FloatMatrix(joined("values"))
    if isinstance(first, Fp8Matrix):
        return replace(first, codes=joined("codes"), scales=joined("scales"))
    return replace(first, codes=joined("codes"), scales=joined("scales"), mins=joined("mins"))


def groups_of(matrix: Matrix) -> int | None:
    """Inputs that share a scale; None where there is none, or one for the row."""
    if isinstance(matrix, FloatMatrix):
        return None
    if isinstance(matrix, Fp8Matrix):
        return matrix.block
    return None if matrix.group == matrix.shape[1] else matrix.group


def columns(matrix: Matrix, start: int, stop: int) -> Matrix:
    """Inputs start .. stop - 1 in memory of their own, whole groups or blocks of them (the last block may be short)."""
    cut, group = slice(start, stop), groups_of(matrix)
    scales = slice(None) if group is None else slice(start // group, -(-stop // group))
    if isinstance(matrix, FloatMatrix):
        return FloatMatrix(matrix.values[:, cut].contiguous())
    codes, kept = matrix.codes[:, cut].contiguous(), matrix.scales[:, scales].contiguous()
    if isinstance(matrix, Fp8Matrix):
        return replace(matrix, codes=codes, scales=kept)
    group = group or stop - start
    return replace(matrix, codes=codes, group=group, scales=kept, mins=matrix.mins[:, scales].contiguous())
