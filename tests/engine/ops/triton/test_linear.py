"""Products with coded weights against the float64 product of the numbers that they stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.limits import WORKSPACE
from engine.ops.interface import Activations, Quantised, Rounding
from engine.ops.reference import quantise_tokens
from engine.ops.triton import linear as triton_linear
from engine.ops.triton.linear import TritonProducts, choose
from engine.quant.coded import CodedLinear
from engine.quant.form import Form
from engine.quant.matrix import Matrix
from tests.engine.quant.test_linear import random_matrix

CPU = torch.device("cpu")
KINDS = ["fp8", "fp8 subnormal", "fp8 blocks", "4/32", "5/32", "6/16", "6/64", "8/32", "8/64"]
SHAPES = {(70, 64): (1, 2, 21, 33, 65), (150, 320): (1, 3, 140)}  # outputs, inputs: neither fills its blocks
ODD = [("fp8", 130, 33), ("int8 rows", 130, 33), ("int8 rows", 5, 7)]


def products(processors: int = 1, decodes: bool = False) -> TritonProducts:
    return TritonProducts(CPU, processors, decodes, interpreted=True)


def made(
    matrix: Matrix, by: TritonProducts | None, bias: Tensor | None = None, wide: bool = True, codes: bool = False
) -> CodedLinear:
    linear = CodedLinear(
        Form.of(matrix), *matrix.shape, bias=bias, wide=wide, quantise_inputs=codes, device=CPU, products=by
    )
    linear.fill(0, matrix)
    return linear


def check(
    linear: CodedLinear, x: Activations, matrix: Matrix, bias: Tensor | None, dtype: torch.dtype, most: float = 4e-6
) -> None:
    """Float32 sums to their rounding; bfloat16 to its own at the end, which the interpreter cuts.

    Args:
        most: of an error, beside the largest result.
    """
    numbers = x.codes.double() * x.scales.double().unsqueeze(1) if isinstance(x, Quantised) else x.double()
    exact = numbers @ matrix.dequantise().double().t() + (0.0 if bias is None else bias.double())
    y = linear(x)
    assert y.dtype == dtype
    torch.testing.assert_close(
        y.double(), exact, rtol=2**-7 if dtype == torch.bfloat16 else 0.0, atol=most * exact.abs().max().item()
    )


@pytest.mark.parametrize("case", [*((kind, *shape) for kind in KINDS for shape in SHAPES), *ODD], ids=str)
def test_products_are_the_plain_ones(case: tuple[str, int, int]) -> None:
    torch.manual_seed(0)
    matrix, bias = random_matrix(*case), torch.randn(case[1])
    linear = made(matrix, products(), bias)
    for rows in SHAPES.get(case[1:], (1, 7)):
        check(linear, torch.randn(rows, case[2]), matrix, bias, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_products_in_parts_are_the_plain_ones(kind: str) -> None:
    torch.manual_seed(0)
    matrix, bias = random_matrix(kind, 70, 2176), torch.randn(70)
    linear = made(matrix, products(132), bias)
    for rows in (3, 20) if kind.startswith("fp8") else (1, 3):
        assert choose(rows, linear._weight, 132)[1] > 1
        check(linear, torch.randn(rows, 2176), matrix, bias, torch.float32)


@pytest.mark.parametrize("kind", ["fp8", "fp8 blocks", "4/32", "6/16"])
@pytest.mark.parametrize("wide", [False, True])
def test_bfloat16_gives_bfloat16_unless_it_is_wide(kind: str, wide: bool) -> None:
    torch.manual_seed(1)
    matrix, bias = random_matrix(kind, 90, 288), torch.randn(90).bfloat16()
    for given in (None, bias):
        for rows in (1, 5) if given is None else (70,):
            x = torch.randn(rows, 288).bfloat16()
            linear, dtype = made(matrix, products(132), given, wide), torch.float32 if wide else torch.bfloat16
            decoded = rows > products().most_rows(linear._weight)  # to bfloat16, and a CPU's sums are rounded to it too
            check(linear, x, matrix, given, dtype, 2**-7 if decoded else 4e-6)


@pytest.mark.parametrize(("scale", "decodes"), [(None, False), (0.02, True)])
@pytest.mark.parametrize("kind", ["fp8", "fp8 blocks"])
def test_w8a8_multiplies_codes(kind: str, scale: float | None, decodes: bool) -> None:
    torch.manual_seed(2)
    matrix, bias = random_matrix(kind, 90, 288), torch.randn(90)
    linear = made(matrix, products(132, decodes), bias, codes=True)
    for rows in (1, 20, 70):
        x = torch.randn(rows, 288) * torch.logspace(-2, 1, rows).unsqueeze(1)
        quantised = quantise_tokens(x, Rounding(scale))
        check(linear, quantised, matrix, bias, torch.float32)
        plain = made(matrix, products(132, decodes), bias, codes=True)
        plain.rounding = Rounding(scale)
        assert torch.equal(plain(x), linear(quantised))


@pytest.mark.parametrize("kind", ["fp8", "6/16"])
def test_a_split_gives_the_same_bits_again_and_leaves_nothing_behind(kind: str) -> None:
    torch.manual_seed(3)
    matrix, by = random_matrix(kind, 70, 2176), products(132)
    linear = made(matrix, by)
    x = torch.randn(5, 2176)
    assert choose(5, linear._weight, 132)[1] > 1
    first = linear(x)
    assert torch.equal(first, linear(x))
    assert not by._arrived.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["fp8", "fp8 w8a8", "fp8 static", "5/32", "8/64"])
def test_what_is_not_finite_spoils_its_row_alone(kind: str, bad: float) -> None:
    torch.manual_seed(4)
    matrix = random_matrix(kind.split()[0], 70, 320)
    for rows in (1, 6, 66):
        linear = made(matrix, products(132), codes=" " in kind)
        if kind == "fp8 static":
            linear.rounding = Rounding(0.01)
        x = torch.randn(rows, 320)
        x[rows - 1, 100] = bad
        y = linear(x)
        assert y[: rows - 1].isfinite().all()
        if kind == "fp8 static" and bad == torch.inf:
            assert y.isfinite().all()  # as in the reference: one scale for all saturates
        else:
            assert not y[-1].isfinite().any()


def test_forms_that_no_step_fits_go_to_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    matrix = random_matrix("4/32", 40, 96)
    monkeypatch.setattr(triton_linear.TritonProducts, "takes", staticmethod(lambda weight: False))
    check(made(matrix, products()), torch.randn(3, 96), matrix, None, torch.float32)


def test_a_split_fills_the_device_and_leaves_each_program_some_steps() -> None:
    """The shapes of NeMo on 132 processors."""
    for outputs, inputs in ((6144, 5120), (5120, 4096), (28672, 5120), (5120, 14336), (131072, 5120)):
        for kind in ("fp8", "4/32"):
            weight = replace(made(random_matrix(kind, 16, 32), None)._weight, outputs=outputs, inputs=inputs)
            for rows in (1, 3, 16, 64) if kind == "fp8" else (1, 2, 3, 16):
                shape, splits = choose(rows, weight, 132)
                programs = -(-outputs // shape.columns) * splits
                assert programs >= 2 * 132
                assert splits == 1 or splits * rows * outputs * 4 <= WORKSPACE
                assert inputs // shape.depth // splits >= 2
