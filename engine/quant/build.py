"""From the matrices of a file to one `Linear`: converts to the precision asked for, fuses, and picks the format.

    parts (q, k, v) ──slab by slab──► Matrix ──convert──► Matrix ──fill──► BlockedLinear, CodedLinear, DenseLinear …

Parts that are stored differently (a Q4_K_M file has some value projections in Q6_K) stay apart inside a JoinedLinear.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.ops import Kernels
from engine.quant.blocked import BLOCK, BlockedLinear
from engine.quant.coded import CodedLinear, Products
from engine.quant.form import Form
from engine.quant.linear import DenseLinear, JoinedLinear, Linear, PackedLinear, Table
from engine.quant.matrix import FloatMatrix, Fp8Matrix, GroupMatrix, Matrix, concat
from engine.quant.quantise import quantise_fp8, quantise_int4, quantise_int6, quantise_int8
from engine.schemes import INT4_GROUP, INT8_GROUP, Kept

_SLAB = 2**20  # weights that are in hand at a time: their float32 temporaries stay in the cache of a core
_PACKED_BYTES = 2**29  # that oneDNN packs at a time, for which it holds them twice


@dataclass(frozen=True, slots=True)
class Part:
    """One matrix of a file: how to read rows start .. stop - 1, how many there are, and its name for messages."""

    read: Callable[[int, int], Matrix]
    outputs: int
    name: str = "a matrix"


@dataclass(frozen=True, slots=True)
class Target:
    """What all linears of an engine share.

    Attributes:
        dtype: compute dtype.
        kernels: the engine's own, on a CPU that has them.
        quantise_inputs: inputs of FP8 weights are rounded to e4m3 as well.
        products: our kernels on a GPU that has them.
        units: the device has matrix units of FP8.
    """

    dtype: torch.dtype
    device: torch.device
    kernels: Kernels | None
    quantise_inputs: bool = False
    products: Products | None = None
    units: bool = False


class _Format(Linear, Table, Protocol):
    def fill(self, start: int, matrix: Matrix) -> None: ...


def build_linear(
    parts: list[Part], inputs: int, kept: Kept, target: Target, *, bias: Tensor | None = None, wide: bool = False
) -> Linear:
    """One map of several matrices over the same input, their outputs one after the other.

    Args:
        kept: how to keep them.
        bias: [all outputs] in the compute dtype on the device, or None.
        wide: give float32 results. For the head: in bfloat16 its rounding makes ties of near ties.

    Raises:
        CheckpointError: weights are too large for the scales that they would get.
    """
    parts = [_converted(part, kept, target) for part in parts]
    joined: list[Linear] = []
    start = 0
    for form, run in itertools.groupby(parts, key=lambda part: Form.of(part.read(0, 1))):
        same = list(run)
        end = start + sum(part.outputs for part in same)
        joined.append(_build(same, form, inputs, target, None if bias is None else bias[start:end], wide))
        start = end
    return joined[0] if len(joined) == 1 else JoinedLinear(joined)


def build_table(part: Part, width: int, kept: Kept, target: Target) -> _Format | DenseLinear:
    """An embedding, that can also serve as the `wide` linear map to logits."""
    part = _converted(part, kept, target)
    form = Form.of(part.read(0, 1))
    if form.bits == 16 and not _blocks(form, target):
        return DenseLinear(_dense([part], width, target), wide=True)
    return _filled([part], form, width, target, None, wide=True)


def _build(parts: list[Part], form: Form, inputs: int, target: Target, bias: Tensor | None, wide: bool) -> Linear:
    if form.bits != 16:
        return _filled(parts, form, inputs, target, bias, wide)
    # oneDNN has kernels for AMX, which are several times faster from some 32 rows on; the head rarely sees so many.
    tiles = target.device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    if _blocks(form, target) and (wide or not tiles):
        return _filled(parts, form, inputs, target, bias, wide)
    if target.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return DenseLinear(_dense(parts, inputs, target), bias, wide)
    outputs = sum(part.outputs for part in parts)
    step = max(1, _PACKED_BYTES // (inputs * target.dtype.itemsize * BLOCK)) * BLOCK
    packed: list[Linear] = []
    for start in range(0, outputs, step):
        weight = _dense(_between(parts, start, start + step), inputs, target)
        packed.append(PackedLinear(weight, None if bias is None else bias[start : start + step], wide))
    return packed[0] if len(packed) == 1 else JoinedLinear(packed)


def _blocks(form: Form, target: Target) -> bool:
    """Our kernel takes this form, and takes it best."""
    kernels = target.kernels
    if kernels is None:
        return False
    return form.bits != 16 or (target.dtype == torch.bfloat16 and kernels.multiplies_bfloat16)


def _filled(
    parts: list[Part], form: Form, inputs: int, target: Target, bias: Tensor | None, wide: bool
) -> BlockedLinear | CodedLinear:
    outputs = sum(part.outputs for part in parts)
    quantise = target.quantise_inputs and form.bits == 0
    linear: BlockedLinear | CodedLinear
    if target.kernels is not None:
        linear = BlockedLinear(
            form, outputs, inputs, bias=bias, wide=wide, quantise_inputs=quantise, kernels=target.kernels
        )
    else:
        linear = CodedLinear(
            form,
            outputs,
            inputs,
            bias=bias,
            wide=wide,
            quantise_inputs=quantise,
            device=target.device,
            products=target.products,
            units=target.units,
        )
    for start, slab in _slabs(parts, inputs):
        linear.fill(start, slab)
    return linear


def _dense(parts: list[Part], inputs: int, target: Target) -> Tensor:
    weight = torch.empty(sum(part.outputs for part in parts), inputs, dtype=target.dtype, device=target.device)
    for start, slab in _slabs(parts, inputs):
        assert isinstance(slab, FloatMatrix)
        weight[start : start + len(slab.values)] = slab.values
    return weight


def _slabs(parts: list[Part], inputs: int) -> Iterator[tuple[int, Matrix]]:
    """The rows of all parts in pieces of whole blocks, with where each begins."""
    step = max(1, _SLAB // inputs // BLOCK) * BLOCK
    for start in range(0, sum(part.outputs for part in parts), step):
        yield start, concat([part.read(0, part.outputs) for part in _between(parts, start, start + step)])


def _between(parts: list[Part], start: int, stop: int) -> list[Part]:
    """What lies in the rows start .. stop - 1 of all parts, one after the other."""
    found, offset = [], 0
    for part in parts:
        low, high = max(start - offset, 0), min(stop - offset, part.outputs)
        if low < high:
            found.append(Part(partial(_read_from, part, low), high - low, part.name))
        offset += part.outputs
    return found


def _read_from(part: Part, origin: int, start: int, stop: int) -> Matrix:
    return part.read(origin + start, origin + stop)


def _converted(part: Part, kept: Kept, target: Target) -> Part:
    def read(start: int, stop: int) -> Matrix:
        matrix = part.read(start, stop)
        converted = _convert(matrix, kept, target)
        if isinstance(converted, GroupMatrix) and converted is not matrix:
            _check_scales(part.name, converted)
        return converted

    return Part(read, part.outputs, part.name)


def _check_scales(name: str, matrix: GroupMatrix) -> None:
    """Refuse weights that are too large for scales in float16."""
    if not (matrix.scales.isfinite().all() and matrix.mins.isfinite().all()):
        raise CheckpointError(
            f"tensor {name} has weights that are too large to be kept in {matrix.bits} bits; choose another precision"
        )


def form_of(part: Part, kept: Kept, target: Target) -> Form:
    """How a matrix will be coded in memory; reads one row."""
    return Form.of(_converted(part, kept, target).read(0, 1))


def _convert(matrix: Matrix, kept: Kept, target: Target) -> Matrix:
    """The matrix as it shall be kept. What is coded already is not coded again if it is as narrow or narrower."""
    if isinstance(matrix, Fp8Matrix) and not target.quantise_inputs:
        matrix = dataclasses.replace(matrix, input_scale=None)  # else fused neighbours would seem to differ
    match kept, matrix:
        case Kept.STORED, _:
            return matrix
        case Kept.FP8, Fp8Matrix():
            return matrix
        case Kept.INT8, GroupMatrix():
            return matrix
        case Kept.INT4 | Kept.INT6, GroupMatrix(bits=4 | 5 | 6):
            return matrix
        case Kept.FLOAT, FloatMatrix():
            return matrix
    weight = matrix.dequantise()
    if kept is Kept.FLOAT:
        return FloatMatrix(weight)
    if kept is Kept.FP8:
        return quantise_fp8(weight)
    if kept is Kept.INT4 and weight.shape[1] % INT4_GROUP == 0:
        return quantise_int4(weight)
    if kept is Kept.INT6 and weight.shape[1] % INT8_GROUP == 0:
        return quantise_int6(weight)
    return quantise_int8(weight)
