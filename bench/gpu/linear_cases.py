"""Cases of the linear maps: every format of weights, as the loader would build it for this device, on one matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

from bench.gpu.kernels import BF16_TOLERANCE, Bench, Case, Named, named, numbers
from engine.ops import Rounding
from engine.ops.reference import quantise_tokens
from engine.quant.coded import UNITS_FROM, CodedLinear, Products, find_products, has_fp8_units
from engine.quant.form import Form
from engine.quant.linear import DenseLinear, Linear
from engine.quant.matrix import FloatMatrix, Fp8Matrix, GroupMatrix, Matrix

PROCESSORS = 132  # of an H100, for the interpreter
# Name: bits (0 = e4m3, 16 = floats), inputs per scale (0 = all), inputs rounded to e4m3 too.
FORMATS = {
    "bf16": (16, 0, False),
    "e4m3 W8A8": (0, 0, True),
    "e4m3 weight-only": (0, 0, False),
    "8 bits": (8, 64, False),
    "6 bits": (6, 64, False),
    "5 bits": (5, 32, False),
    "4 bits": (4, 32, False),
}


def linear_cases(bench: Bench) -> Iterator[Named]:
    """NeMo's largest matrix, gate | up, by numbers of rows; its weight is made once for each format."""
    model = bench.workload.model
    outputs, inputs = 2 * model.intermediate_size, model.hidden_size
    for name in FORMATS:
        made = cache(partial(build, bench, name, outputs, inputs))
        for rows in bench.workload.rows:
            yield named(f"linear {name}, {rows} rows", linear_case, bench, name, rows, made)


def build(bench: Bench, name: str, outputs: int, inputs: int) -> tuple[Matrix, Linear]:
    """The matrix, and the map that a decoder on this device would have of it."""
    bits, group, quantise_inputs = FORMATS[name]
    matrix = random_matrix(bench, bits, group, outputs, inputs)
    if isinstance(matrix, FloatMatrix):
        return matrix, DenseLinear(matrix.values)
    linear = CodedLinear(
        Form.of(matrix),
        outputs,
        inputs,
        bias=None,
        wide=False,
        quantise_inputs=quantise_inputs,
        device=bench.device,
        products=_products(bench),
        units=has_fp8_units(bench.device),
    )
    linear.fill(0, matrix)
    return matrix, linear


def linear_case(bench: Bench, name: str, rows: int, made: Callable[[], tuple[Matrix, Linear]]) -> Case:
    """Against the product in float64 of the numbers that weights and inputs stand for."""
    matrix, linear = made()
    outputs, inputs = matrix.shape
    x = bench.randn(rows, inputs)
    given = quantise_tokens(x, Rounding(None)) if FORMATS[name][2] else x

    def expected() -> list[Tensor]:
        exact = numbers(given).double()
        step = max(1, 2**26 // inputs)  # outputs at a time: the whole in float64 would be gigabytes
        weight = matrix.dequantise()
        return [torch.cat([exact @ slab.double().t() for slab in torch.split(weight, step)], dim=1)]

    return Case(
        expected,
        run=lambda: linear(given),
        outputs=lambda result: [result],
        tolerance=BF16_TOLERANCE,
        nbytes=linear.nbytes + x.nbytes + rows * outputs * x.element_size(),
        flops=2.0 * rows * outputs * inputs,
        fp8=FORMATS[name][2] and rows >= UNITS_FROM,
    )


def random_matrix(bench: Bench, bits: int, group: int, outputs: int, inputs: int) -> Matrix:
    """Scales of many sizes, so that one in the wrong place shows."""
    device = bench.device
    if bits == 16:
        return FloatMatrix(bench.randn(outputs, inputs))
    scales = torch.rand(outputs, inputs // group if group else 1, device=device) + 0.5
    if bits == 0:
        return Fp8Matrix((bench.randn(outputs, inputs) * 100).clamp(-448, 448).to(torch.float8_e4m3fn), scales)
    codes = torch.randint(0, 2**bits, (outputs, inputs), dtype=torch.uint8, device=device)
    scales = scales.half().float()  # as they are kept
    symmetric = bits in (6, 8)
    mins = 2 ** (bits - 1) * (scales if symmetric else torch.rand_like(scales).half().float())
    return GroupMatrix(codes, bits, group, scales, mins)


def _products(bench: Bench) -> Products | None:
    if not bench.interpreted:
        return find_products(bench.device)
    from engine.ops.triton.linear import TritonProducts  # needs Triton, which is not everywhere

    return TritonProducts(bench.device, PROCESSORS, decodes=False, interpreted=True)
