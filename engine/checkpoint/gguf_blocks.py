"""The tensor types of GGUF files that we read, and their blocks taken apart: codes, scales and minima, never floats.

A row is a sequence of blocks, each with its own scales, and a matrix of any of these types is a `GroupMatrix`:
weight = code * scale - min. Where ggml stores signed codes, min = zero * scale.

    type  weights  bytes  block (d, m, dmin: float16)                           scale          min
    Q4_0       32     18  d, 16 bytes of nibbles                                d              8 d
    Q4_1       32     20  d, m, 16 bytes of nibbles                             d              -m
    Q5_0       32     22  d, 32 high bits, 16 bytes of nibbles                  d              16 d
    Q5_1       32     24  d, m, 32 high bits, 16 bytes of nibbles               d              -m
    Q8_0       32     34  d, 32 int8                                            d              128 d
    Q4_K      256    144  d, dmin, 8 x 6 + 6 bits, 128 bytes of nibbles         d * 6 bits     dmin * 6 bits, per 32
    Q5_K      256    176  d, dmin, 8 x 6 + 6 bits, 256 high bits, 128 bytes     the same
    Q6_K      256    210  128 bytes of nibbles, 256 x 2 high bits, 16 int8, d   d * int8       32 * scale, per 16

All of this is exact in float32. Source: ggml-org/ggml, src/ggml-common.h (`block_q4_0` and so on) and the functions
`dequantize_row_*` of src/ggml-quants.c; type numbers: `enum ggml_type` of include/ggml.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.quant.matrix import FloatMatrix, GroupMatrix, Matrix


class _Blocks(NamedTuple):
    """Of n blocks: uint8 [n, weights of a block]; float32 [n, groups of a block], twice."""

    codes: Tensor
    scales: Tensor
    mins: Tensor


@dataclass(frozen=True, slots=True)
class TensorType:
    """One type of ggml.

    Attributes:
        weights, nbytes: of a block; a float is a block of its own.
        floats: the dtype, for float types.
        bits: of a code, for the others.
        unpack: uint8 [n, nbytes] -> the parts of n blocks, for the others.
    """

    name: str
    weights: int
    nbytes: int
    floats: torch.dtype | None = None
    bits: int = 0
    unpack: Callable[[Tensor], _Blocks] | None = None

    def row_bytes(self, inputs: int) -> int:
        """Of a row; inputs is whole blocks."""
        return inputs // self.weights * self.nbytes

    def matrix(self, raw: Tensor) -> Matrix:
        """Rows as the file has them, uint8 [rows, row_bytes], aligned to a float -> the same rows as a matrix."""
        if self.floats is not None:
            return FloatMatrix(raw.view(self.floats))
        assert self.unpack is not None
        codes, scales, mins = self.unpack(raw.view(-1, self.nbytes))
        shape = (len(raw), -1)
        group = codes.shape[1] // scales.shape[1]
        return GroupMatrix(codes.view(shape), self.bits, group, scales.view(shape), mins.view(shape))


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block: float32 [n, 1]."""
    return blocks[:, at : at + 2].view(torch.float16).float()


def _nibbles(packed: Tensor, run: int) -> Tensor:
    """uint8 [n, m] -> uint8 [n, 2m]: of each run of bytes the low halves, then the high ones."""
    runs = packed.shape[1] // run
    packed = packed.view(-1, runs, run)
    codes = packed.new_empty(len(packed), runs, 2, run)
    torch.bitwise_and(packed, 15, out=codes[:, :, 0])
    torch.bitwise_right_shift(packed, 4, out=codes[:, :, 1])
    return codes.flatten(1)


def _add_high(codes: Tensor, high: Tensor, count: int) -> Tensor:
    """Put bits above the fourth in place: `high` has them, `count` of each code, in runs of bytes.

    Args:
        codes: uint8 [n, m], changed.
        high: uint8 [n, runs, 1, run]; the bits 0, count, 2 * count … of a byte belong to codes that are a run apart.
    """
    for i in range(8 // count):
        bits = (high >> (i * count)).bitwise_and_(2**count - 1).bitwise_left_shift_(4)
        codes.view(len(codes), high.shape[1], 8 // count, -1)[:, :, i] |= bits[:, :, 0]
    return codes


def _q4_0(blocks: Tensor) -> _Blocks:
    d = _half(blocks, 0)
    return _Blocks(_nibbles(blocks[:, 2:], 16), d, 8 * d)


def _q4_1(blocks: Tensor) -> _Blocks:
    return _Blocks(_nibbles(blocks[:, 4:], 16), _half(blocks, 0), -_half(blocks, 2))


def _five_bits(high: Tensor, packed: Tensor) -> Tensor:
    """uint8 [n, 4], bit i for code i, and [n, 16] of nibbles -> uint8 [n, 32]."""
    bits = (high.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).bitwise_left_shift_(4)
    return _nibbles(packed, 16).bitwise_or_(bits.flatten(1))


def _q5_0(blocks: Tensor) -> _Blocks:
    d = _half(blocks, 0)
    return _Blocks(_five_bits(blocks[:, 2:6], blocks[:, 6:]), d, 16 * d)


def _q5_1(blocks: Tensor) -> _Blocks:
    return _Blocks(_five_bits(blocks[:, 4:8], blocks[:, 8:]), _half(blocks, 0), -_half(blocks, 2))


def _q8_0(blocks: Tensor) -> _Blocks:
    d = _half(blocks, 0)
    return _Blocks(blocks[:, 2:] ^ 0x80, d, 128 * d)  # int8 + 128


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of the eight groups of Q4_K and Q5_K: `get_scale_min_k4` of ggml-quants.c.

    Six bits each, in bytes 4 to 15: four scales and four minima, with two bits of the others above them, then a nibble
    of each of the others.
    """
    first, second, low = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([first & 63, low & 15 | first >> 6 << 4], dim=1)
    mins = torch.cat([second & 63, low >> 4 | second >> 6 << 4], dim=1)
    return _half(blocks, 0) * scales, _half(blocks, 2) * mins


def _q4_k(blocks: Tensor) -> _Blocks:
    return _Blocks(_nibbles(blocks[:, 16:], 32), *_k_scales(blocks))


def _q5_k(blocks: Tensor) -> _Blocks:
    high = blocks[:, 16:48].view(-1, 1, 1, 32)
    return _Blocks(_add_high(_nibbles(blocks[:, 48:], 32), high, 1), *_k_scales(blocks))


def _q6_k(blocks: Tensor) -> _Blocks:
    high = blocks[:, 128:192].view(-1, 2, 1, 32)
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    return _Blocks(_add_high(_nibbles(blocks[:, :128], 64), high, 2), scales, 32 * scales)


TYPES = {
    0: TensorType("F32", 1, 4, torch.float32),
    1: TensorType("F16", 1, 2, torch.float16),
    30: TensorType("BF16", 1, 2, torch.bfloat16),
    2: TensorType("Q4_0", 32, 18, bits=4, unpack=_q4_0),
    3: TensorType("Q4_1", 32, 20, bits=4, unpack=_q4_1),
    6: TensorType("Q5_0", 32, 22, bits=5, unpack=_q5_0),
    7: TensorType("Q5_1", 32, 24, bits=5, unpack=_q5_1),
    8: TensorType("Q8_0", 32, 34, bits=8, unpack=_q8_0),
    12: TensorType("Q4_K", 256, 144, bits=4, unpack=_q4_k),
    13: TensorType("Q5_K", 256, 176, bits=5, unpack=_q5_k),
    14: TensorType("Q6_K", 256, 210, bits=6, unpack=_q6_k),
}

# For messages. Two and three bits would grow to our four; IQ types look their codes up in tables.
OTHER_NAMES = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}
