"""Products with coded weights: few rows stream the codes once, many rows decode them tile by tile on their way.

    rows   1                   2 .. 64                              more
           sums of products    matrix units, scales come after      matrix units, scales come first where they are of
           in registers        the product of their group           groups: cheaper than scaling many rows of sums
           └────────── depth is split among programs ──────────┘

What a split leaves is summed by the last of its programs to arrive, always in the same order: results are reproducible.
Layouts are those of `engine.ops.interface.CodedWeight`, the reference is `engine.quant.coded.CodedLinear`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.limits import SPLIT_ROWS, WORKSPACE
from engine.ops.interface import Activations, CodedWeight, Quantised, Rounding
from engine.ops.reference import floats
from engine.ops.triton.linear_kernels import bytes_linear, groups_linear
from engine.ops.triton.tokens import quantise_tokens


@dataclass(frozen=True, slots=True)
class Shape:
    """One way to launch: a program makes rows x columns of the result, in steps of `depth` inputs.

    Attributes:
        stages: steps whose codes are on their way while one is computed.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Few rows are a matter of bytes in flight: latency times bandwidth is 2.0 MB on an A100 (108 processors), 2.7 MB on an
# H100 and 3.8 MB on an H200 (132), 19 to 29 KB for each processor. A step is 2 to 8 KiB of codes, `stages` of them are
# on their way, and four programs or more share a processor. Rows of e4m3 lie along the inputs, so that a step is long
# and narrow; codes in groups lie along the outputs, so that it is short (one group) and wide.
# Columns are also what the input's own traffic from L2 is divided by: with 16 rows, 64 of them keep it to a quarter.
# Many rows are a matter of matrix units: tiles are as large as 8 warps hold in registers beside their decoding, without
# spilling on any card, and with the scales of groups in the 99 KiB of shared memory that an Ada card has.
# Worked out, not measured; `choose` is the only reader.
_BYTES = (
    Shape(rows=1, columns=16, depth=512, warps=4, stages=3),
    Shape(rows=16, columns=64, depth=128, warps=4, stages=4),
    Shape(rows=32, columns=64, depth=128, warps=4, stages=4),
    Shape(rows=64, columns=64, depth=128, warps=8, stages=4),
    Shape(rows=128, columns=128, depth=64, warps=8, stages=3),
)
_GROUPS = (
    Shape(rows=1, columns=256, depth=32, warps=4, stages=4),
    Shape(rows=16, columns=128, depth=32, warps=4, stages=5),
    Shape(rows=32, columns=128, depth=32, warps=4, stages=5),
    Shape(rows=64, columns=128, depth=32, warps=8, stages=5),
    Shape(rows=128, columns=64, depth=64, warps=8, stages=2),
)
_WHOLE = 2**30  # a group that no input is beyond
_WAVES = 4  # programs per processor that a split aims at: two that run and two that wait, so that the last ones overlap
_LEAST_STEPS = 4  # of a program, or its start would cost more than its work
_SWIZZLE = 8  # blocks of rows that take turns on the same weights, so that both they and the weights stay in L2
_LEAST_BLOCK = 128  # inputs per scale, of e4m3
_BLOCKS = 2**16  # of columns at most: 4 million outputs


def choose(rows: int, weight: CodedWeight, processors: int) -> tuple[Shape, int]:
    """How to launch a product of so many rows, and among how many programs to split its depth."""
    table = _BYTES if weight.bits == 0 else _GROUPS
    shape = next((each for each in table if rows <= each.rows), table[-1])
    if weight.bits == 0 and weight.group:
        shape = replace(shape, depth=min(shape.depth, _LEAST_BLOCK))  # a step has one scale per output
    if shape.rows > SPLIT_ROWS:
        return shape, 1
    programs = triton.cdiv(weight.outputs, shape.columns)
    steps = triton.cdiv(weight.inputs, shape.depth)
    splits, most = 1, min(16, WORKSPACE // (4 * rows * weight.outputs))
    while programs * splits < _WAVES * processors and steps // (2 * splits) >= _LEAST_STEPS and 2 * splits <= most:
        splits *= 2
    return shape, splits


class TritonProducts:
    """Products of activations and coded weights on one CUDA device. Calls share scratch memory, so they share a stream.

    Args:
        processors: of the device; how many programs it takes to fill it.
        decodes: it has instructions for e4m3 (compute capability 8.9 and later); elsewhere we decode bits.
        interpreted: by Triton's interpreter, which multiplies nothing but float32.
    """

    def __init__(self, device: torch.device, processors: int, decodes: bool, interpreted: bool = False) -> None:
        self._processors, self._decodes, self._interpreted = processors, decodes, interpreted
        self._arrived = torch.zeros(_BLOCKS, dtype=torch.int32, device=device)

    @classmethod
    def on(cls, device: torch.device) -> TritonProducts:
        capability = torch.cuda.get_device_capability(device)
        return cls(device, torch.cuda.get_device_properties(device).multi_processor_count, capability >= (8, 9))

    @staticmethod
    def takes(weight: CodedWeight) -> bool:
        """Whether the groups of a weight are whole in a step of every shape."""
        if weight.bits == 0:
            return weight.group == 0 or weight.group % _LEAST_BLOCK == 0
        return weight.group == 0 or weight.group % 32 == 0 or weight.group == 16

    def multiply(self, x: Activations, weight: CodedWeight, bias: Tensor | None, wide: bool) -> Tensor:
        """x · weightᵀ + bias: [rows, outputs] in x's dtype, or in float32 if `wide`.

        Args:
            x: float32 or bfloat16 [rows, inputs], contiguous, or codes.
        """
        shape, splits = choose(len(x), weight, self._processors)
        rows, outputs, inputs = len(x), weight.outputs, weight.inputs
        y = torch.empty(rows, outputs, dtype=torch.float32 if wide else x.dtype, device=weight.codes.device)
        steps = triton.cdiv(triton.cdiv(inputs, shape.depth), splits)
        partial = torch.empty((splits, rows, outputs), dtype=torch.float32, device=y.device) if splits > 1 else None
        grid = (triton.cdiv(rows, shape.rows) * triton.cdiv(outputs, shape.columns), splits)
        group = weight.group or _WHOLE
        common = {
            "ROWS": shape.rows,
            "COLUMNS": shape.columns,
            "DEPTH": shape.depth,
            "STAGES": shape.stages,
            "SWIZZLE": _SWIZZLE,
            "SPLITS": splits,
            "BIAS": bias is not None,
            "DOT": self._dot_type(x),
            "num_warps": shape.warps,
        }
        sizes = (rows, outputs, inputs, group, steps)
        if weight.bits == 0:
            given, x_scales = (x, None) if isinstance(x, Tensor) else (self._stored(x.codes), x.scales)
            bytes_linear[grid](
                given, x_scales, self._stored(weight.codes), weight.scales, bias, y, partial, self._arrived, *sizes,
                GROUPED=weight.group != 0, X_CODES=x_scales is not None, **common,
            )  # fmt: skip
        else:
            groups_linear[grid](
                floats(x), weight.codes, weight.high, weight.scales, weight.mins, bias, y, partial, self._arrived,
                *sizes, BITS=weight.bits, SMALL=weight.group == 16, **common,
            )  # fmt: skip
        return y

    def quantise(self, x: Tensor, rounding: Rounding) -> Quantised:
        return quantise_tokens(x, rounding)

    def _stored(self, codes: Tensor) -> Tensor:
        """As numbers where the device knows them, as bytes elsewhere."""
        return codes if self._decodes else codes.view(torch.uint8)

    def _dot_type(self, x: Activations) -> tl.dtype:
        """Codes are exact in float16, whose products are as fast as bfloat16's; floats stay what they are."""
        if self._interpreted:
            return tl.float32
        if isinstance(x, Quantised):
            return tl.float16
        return tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float32
