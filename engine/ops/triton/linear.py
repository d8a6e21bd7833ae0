"""Products with coded weights: few rows stream the codes once, for many rows they are decoded, slab by slab.

    rows   1 .. 4 (of e4m3: 1)      .. 16 (of e4m3: 64)            more
           sums of products         matrix units; scales come      weights as numbers, for the
           in registers             after the product              library's matrix product
           └── depth is split among programs ──┘

A slab is written once and read once, mostly from L2, beside what a product of many rows takes; a kernel that decodes
each tile on its way to the matrix units does it anew for each block of rows. What a split leaves is summed by the last
of its programs to arrive, always in the same order: results are reproducible. Layouts are those of
`engine.ops.interface.CodedWeight`, the reference is `engine.quant.coded.CodedLinear`.
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
from engine.ops.triton.linear_kernels import bytes_linear, decode_bytes, decode_groups, groups_linear
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
# on their way, and several programs share a processor. Rows of e4m3 lie along the inputs, so that a step is long and
# narrow; codes in groups lie along the outputs, so that it is short (one group of 32) and wide.
# The best of those tried on an H100, over NeMo's four matrices; `choose` is the only reader.
_BYTES = (
    Shape(rows=1, columns=8, depth=512, warps=2, stages=4),
    Shape(rows=16, columns=16, depth=256, warps=2, stages=4),
    Shape(rows=32, columns=32, depth=128, warps=4, stages=5),
    Shape(rows=SPLIT_ROWS, columns=32, depth=128, warps=4, stages=4),
)
_GROUPS = (
    Shape(rows=1, columns=256, depth=32, warps=4, stages=4),
    Shape(rows=2, columns=256, depth=32, warps=4, stages=4),
    Shape(rows=4, columns=256, depth=32, warps=4, stages=4),
    Shape(rows=16, columns=128, depth=32, warps=4, stages=5),
)
_WHOLE = 2**30  # a group that no input is beyond
_WAVES = 4  # programs per processor that a split aims at: two that run and two that wait, so that the last ones overlap
_LEAST_STEPS = 4  # of a program, or its start would cost more than its work
_LEAST_BLOCK = 128  # inputs per scale, of e4m3
_BLOCKS = 2**16  # of columns at most: 524,288 outputs
_DECODED = 2048  # e4m3 codes of a program that decodes
_DECODED_COLUMNS = 256  # of codes in groups, by 32 inputs


def choose(rows: int, weight: CodedWeight, processors: int) -> tuple[Shape, int]:
    """How to launch a product of so many rows, `most_rows` at most, and among how many programs to split its depth."""
    table = _BYTES if weight.bits == 0 else _GROUPS
    shape = next(each for each in table if rows <= each.rows)
    if weight.bits == 0 and weight.group and shape.depth > _LEAST_BLOCK:  # a step has one scale per output
        shape = replace(shape, depth=_LEAST_BLOCK, columns=shape.columns * shape.depth // _LEAST_BLOCK)
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

    @staticmethod
    def most_rows(weight: CodedWeight) -> int:
        """Rows that `multiply` takes at most: beyond, an H100 is sooner done with `decode` and a product of numbers."""
        return (_BYTES if weight.bits == 0 else _GROUPS)[-1].rows

    def multiply(self, x: Activations, weight: CodedWeight, bias: Tensor | None, wide: bool) -> Tensor:
        """x · weightᵀ + bias: [rows, outputs] in x's dtype, or in float32 if `wide`.

        Args:
            x: float32 or bfloat16 [rows, inputs], contiguous, or codes; `most_rows` at most.
        """
        shape, splits = choose(len(x), weight, self._processors)
        rows, outputs, inputs = len(x), weight.outputs, weight.inputs
        y = torch.empty(rows, outputs, dtype=torch.float32 if wide else x.dtype, device=weight.codes.device)
        steps = triton.cdiv(triton.cdiv(inputs, shape.depth), splits)
        partial = torch.empty((splits, rows, outputs), dtype=torch.float32, device=y.device) if splits > 1 else None
        grid = (triton.cdiv(outputs, shape.columns), splits)
        group = weight.group or _WHOLE
        common = {
            "ROWS": shape.rows,
            "COLUMNS": shape.columns,
            "STAGES": shape.stages,
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
                DEPTH=shape.depth, GROUPED=weight.group != 0, X_CODES=x_scales is not None, **common,
            )  # fmt: skip
        else:
            groups_linear[grid](
                floats(x), weight.codes, weight.high, weight.scales, weight.mins, bias, y, partial, self._arrived,
                *sizes, BITS=weight.bits, SMALL=weight.group == 16, **common,
            )  # fmt: skip
        return y

    def decode(self, weight: CodedWeight, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows start .. stop - 1 of a weight as numbers: [stop - start, inputs], in memory as the codes lie."""
        width, inputs, group = stop - start, weight.inputs, weight.group or _WHOLE
        if weight.bits == 0:
            out = torch.empty(width, inputs, dtype=dtype, device=weight.codes.device)
            decode_bytes[width, triton.cdiv(inputs, _DECODED)](
                self._stored(weight.codes), weight.scales, out, start, inputs, weight.outputs, group,
                GROUPED=weight.group != 0, BLOCK=_DECODED, num_warps=4,
            )  # fmt: skip
            return out
        out = torch.empty(inputs, width, dtype=dtype, device=weight.codes.device)
        decode_groups[triton.cdiv(inputs, 32), triton.cdiv(width, _DECODED_COLUMNS)](
            weight.codes, weight.high, weight.scales, weight.mins, out, start, width, inputs, weight.outputs, group,
            BITS=weight.bits, COLUMNS=_DECODED_COLUMNS, num_warps=4,
        )  # fmt: skip
        return out.t()

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
