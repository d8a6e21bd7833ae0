"""Inputs rounded by whoever makes them: the same products as if the linear map had rounded them itself."""

from __future__ import annotations

import pytest
import torch

from engine.ops import Rounding, floats
from engine.ops.reference import ReferenceOps, quantise_tokens
from engine.quant.build import Part, Target, build_linear
from engine.quant.coded import CodedLinear
from engine.quant.form import Form
from engine.quant.linear import DenseLinear, JoinedLinear, Linear
from engine.quant.matrix import Fp8Matrix
from engine.schemes import Kept

CPU = torch.device("cpu")


def matrix(outputs: int, inputs: int, input_scale: float | None = None) -> Fp8Matrix:
    codes = (torch.randn(outputs, inputs) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    return Fp8Matrix(codes, torch.rand(outputs, 1) * 0.02 + 1e-4, input_scale=input_scale)


def w8a8(weight: Fp8Matrix, bias: torch.Tensor | None = None, units: bool = False, wide: bool = False) -> CodedLinear:
    linear = CodedLinear(
        Form.of(weight), *weight.shape, bias=bias, wide=wide, quantise_inputs=True, device=CPU, units=units
    )
    linear.fill(0, weight)
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.01])
def test_norm_and_swiglu_round_for_the_map_behind_them(scale: float | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear, ops = w8a8(matrix(48, 96, scale)), ReferenceOps()
    assert linear.rounding == Rounding(scale)
    x, residual, weight = torch.randn(7, 96).to(dtype), torch.randn(7, 96), torch.rand(96).to(dtype)
    gate_up = torch.randn(7, 192).to(dtype)
    normed = [ops.add_rms_norm(x, residual.clone(), weight, 1e-5, rounding) for rounding in (None, linear.rounding)]
    gated = [ops.silu_mul(gate_up, rounding) for rounding in (None, linear.rounding)]
    for plain, rounded in (normed, gated):
        assert isinstance(plain, torch.Tensor)
        y = linear(rounded)
        assert y.dtype == dtype
        assert torch.equal(linear(plain), y)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_matrix_units_multiply_what_decoding_does(with_bias: bool, wide: bool) -> None:
    torch.manual_seed(1)
    weight, bias = matrix(64, 96), torch.randn(64) if with_bias else None
    for rows in (1, 16, 17, 40):
        x = torch.randn(rows, 96) * torch.logspace(-3, 3, rows).unsqueeze(1)
        x[rows // 2] = 0
        quantised = quantise_tokens(x, Rounding(None))
        exact = floats(quantised).double() @ weight.dequantise().double().t() + (0.0 if bias is None else bias.double())
        for units in (True, False):
            y = w8a8(weight, bias, units, wide)(x)
            assert y.dtype == torch.float32
            torch.testing.assert_close(
                y.double(), exact, rtol=2**-16 if wide else 2**-8, atol=1e-5 * exact.abs().max().item()
            )


def test_a_token_that_is_not_finite_fails_alone() -> None:
    torch.manual_seed(2)
    for units in (True, False):
        x = torch.randn(20, 96)
        x[3, 5] = torch.nan
        y = w8a8(matrix(64, 96), units=units)(x)
        assert not y[3].isfinite().any()
        assert y[torch.arange(20) != 3].isfinite().all()


def test_fused_neighbours_are_rounded_for_only_where_they_agree() -> None:
    def joined(*parts: Linear) -> Rounding | None:
        return JoinedLinear([*parts]).rounding

    torch.manual_seed(3)
    own, other = w8a8(matrix(16, 32)), w8a8(matrix(16, 32, 0.5))
    assert joined(own, own) == Rounding(None)
    assert joined(own, other) is None
    assert joined(own, DenseLinear(torch.zeros(16, 32))) is None


def test_maps_that_take_no_codes_get_the_numbers() -> None:
    torch.manual_seed(4)
    weight = torch.randn(16, 32)
    quantised = quantise_tokens(torch.randn(5, 32), Rounding(None))
    torch.testing.assert_close(DenseLinear(weight)(quantised), floats(quantised) @ weight.t())
    weights = matrix(16, 32)
    part = Part(lambda start, stop: Fp8Matrix(weights.codes[start:stop], weights.scales[start:stop]), 16)
    weight_only = build_linear([part], 32, Kept.STORED, Target(torch.float32, CPU, None))
    assert weight_only.rounding is None
    torch.testing.assert_close(weight_only(quantised), floats(quantised) @ weights.dequantise().t())
