"""The precisions that weights can be kept in, and what each of them makes of the three kinds of matrices. Torch-free.

The bytes that a matrix takes are worked out here once, for the memory plan before loading and as a check after it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Kept(enum.Enum):
    """How one matrix is kept in memory."""

    STORED = "as the file stores it"
    FLOAT = "the compute dtype"
    FP8 = "e4m3, a float32 scale per output"
    INT8 = "8 bits, a float32 scale per output"
    INT4 = "4 bits, a float16 scale and minimum per 32 inputs"

    def nbytes(self, outputs: int, inputs: int, float_bytes: int) -> int:
        """Bytes of a matrix of this shape; FLOAT's for STORED, whose size only the file knows."""
        if self in (Kept.FP8, Kept.INT8):
            return outputs * (inputs + 4)
        if self is Kept.INT4:
            return outputs * (inputs // 2 + inputs // INT4_GROUP * 4)
        return outputs * inputs * float_bytes


INT4_GROUP = 32  # inputs that share a scale and a minimum
DECODE_SLAB = 2**25  # weights that plain torch decodes at a time: 64 MiB of bfloat16


@dataclass(frozen=True, slots=True)
class Scheme:
    """What one precision does.

    Attributes:
        linear: the projections of all layers.
        head, embedding: the two matrices of the vocabulary. Tied, they are one, kept as the head.
        quantise_inputs: inputs of FP8 projections are rounded to e4m3 as well.
    """

    linear: Kept
    head: Kept
    embedding: Kept
    quantise_inputs: bool = False


SCHEMES = {
    "auto": Scheme(Kept.STORED, Kept.STORED, Kept.STORED),
    "bf16": Scheme(Kept.FLOAT, Kept.FLOAT, Kept.FLOAT),
    # As every published FP8 checkpoint: the head decides between near ties, and the embedding is only looked up.
    "fp8": Scheme(Kept.FP8, Kept.FLOAT, Kept.FLOAT, quantise_inputs=True),
    "fp8-weight-only": Scheme(Kept.FP8, Kept.FLOAT, Kept.FLOAT),
    "int8": Scheme(Kept.INT8, Kept.INT8, Kept.INT8),
    "int4": Scheme(Kept.INT4, Kept.INT8, Kept.INT8),
}

KV_PRECISIONS = ("auto", "bf16", "fp8")  # of keys and values: the compute dtype, the same, e4m3
