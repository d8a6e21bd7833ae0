"""The precisions that weights can be kept in, and what each of them makes of the kinds of matrices. Torch-free.

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
    INT8 = "8 bits, a float16 scale per 64 inputs"
    INT6 = "6 bits, a float16 scale per 64 inputs"
    INT4 = "4 bits, a float16 scale and minimum per 32 inputs"

    def nbytes(self, outputs: int, inputs: int, float_bytes: int) -> int:
        """Bytes of a matrix of this shape; FLOAT's for STORED, whose size only the file knows."""
        if self is Kept.FP8:
            return outputs * (inputs + 4)
        if self is Kept.INT4 and inputs % INT4_GROUP == 0:
            return outputs * (inputs // 2 + inputs // INT4_GROUP * 4)
        if self is Kept.INT6 and inputs % INT8_GROUP == 0:
            return outputs * (inputs * 6 // 8 + inputs // INT8_GROUP * 2)
        if self in (Kept.INT4, Kept.INT6, Kept.INT8):  # groups must be whole; else 8 bits, a row is a group
            return outputs * (inputs + (4 if inputs % INT8_GROUP else inputs // INT8_GROUP * 2))
        return outputs * inputs * float_bytes


E4M3_MAX = 448.0  # the largest number of float8_e4m3fn
LEAST_SCALE = 2.0**-126  # the least normal number, so that a vector of zeros is safe and 1 / scale is finite
INT4_GROUP = 32  # inputs that share a scale (and a minimum)
INT8_GROUP = 64  # the same, in 6 bits too: half the KL of a scale per row for 3 % more bytes (docs/quality.md)


@dataclass(frozen=True, slots=True)
class Scheme:
    """What one precision does.

    Attributes:
        linear: the projections of all layers.
        head, embedding: the two matrices of the vocabulary. Tied, they are one, kept as the head.
        gate_up: gate and up projections, but for the first and the last eighth of the layers; None = as the others.
        quantise_inputs: inputs of FP8 projections are rounded to e4m3 as well.
    """

    linear: Kept
    head: Kept
    embedding: Kept
    gate_up: Kept | None = None
    quantise_inputs: bool = False

    def projection(self, name: str, layers: int) -> Kept:
        """How a projection is kept.

        Args:
            name: as in checkpoints, model.layers.0.self_attn.q_proj.weight.
            layers: of the model.
        """
        _, _, layer, _, kind, _ = name.split(".")
        inner = layers // 8 <= int(layer) < layers - layers // 8
        return self.gate_up if self.gate_up and inner and kind in ("gate_proj", "up_proj") else self.linear


SCHEMES = {
    "auto": Scheme(Kept.STORED, Kept.STORED, Kept.STORED),
    "bf16": Scheme(Kept.FLOAT, Kept.FLOAT, Kept.FLOAT),
    # As every published FP8 checkpoint: the head decides between near ties, and the embedding is only looked up.
    "fp8": Scheme(Kept.FP8, Kept.FLOAT, Kept.FLOAT, quantise_inputs=True),
    "fp8-weight-only": Scheme(Kept.FP8, Kept.FLOAT, Kept.FLOAT),
    "int8": Scheme(Kept.INT8, Kept.INT8, Kept.INT8),
    # 4 bits only where they cost least for what they save: all else has 6, at a third of the loss (docs/quality.md).
    "int4": Scheme(Kept.INT6, Kept.INT8, Kept.INT6, gate_up=Kept.INT4),
}

KV_PRECISIONS = ("auto", "bf16", "fp8")  # of keys and values: the compute dtype, the same, e4m3
