"""Norm, SwiGLU and the rounding of tokens against the plain-torch specification."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from engine.ops.interface import Activations, Quantised, Rounding
from engine.ops.reference import ReferenceOps, floats
from engine.ops.reference import quantise_tokens as reference_quantise
from engine.ops.triton.activation import silu_mul
from engine.ops.triton.norm import add_rms_norm
from engine.ops.triton.tokens import quantise_tokens
from tests.engine.ops.cases import assert_close

REFERENCE = ReferenceOps()
DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [(1, 1), (3, 70), (2, 5120)]  # tokens, width
ROUNDINGS = [None, Rounding(None), Rounding(0.011)]


def check(actual: Activations, expected: Activations, dtype: torch.dtype) -> None:
    """Tensors to rounding. Codes differ where the number before them does, by one step: at most one in 500 of them; in
    bfloat16, which the interpreter cuts where the hardware rounds, one in 5."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor)
        assert_close(actual, expected)
        return
    assert isinstance(actual, Quantised)
    assert actual.dtype == expected.dtype == dtype
    torch.testing.assert_close(actual.scales, expected.scales, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=0)
    steps = (actual.codes.view(torch.uint8).int() - expected.codes.view(torch.uint8).int()).abs()
    assert steps.max() <= 1
    assert (steps > 0).sum() <= 1 + steps.numel() / (500 if dtype == torch.float32 else 5)
    torch.testing.assert_close(floats(actual).float(), floats(expected).float(), rtol=0.14, atol=2e-3)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), WIDTHS)
def test_add_rms_norm_is_the_references(tokens: int, width: int, dtype: torch.dtype, rounding: Rounding | None) -> None:
    torch.manual_seed(width)
    x, weight = torch.randn(tokens, width).to(dtype), (torch.rand(width) + 0.5).to(dtype)
    residual = torch.randn(tokens, width) * 3
    mine = residual.clone()
    expected = REFERENCE.add_rms_norm(x, residual, weight, 1e-5, rounding)
    check(add_rms_norm(x, mine, weight, 1e-5, rounding), expected, dtype)
    assert torch.equal(mine, residual)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), WIDTHS)
def test_silu_mul_is_the_references(tokens: int, width: int, dtype: torch.dtype, rounding: Rounding | None) -> None:
    torch.manual_seed(width)
    gate_up = (torch.randn(tokens, 2 * width) * 3).to(dtype)
    gate_up[0, 0] = -200.0
    check(silu_mul(gate_up, rounding), REFERENCE.silu_mul(gate_up, rounding), dtype)


@pytest.mark.parametrize("rounding", ROUNDINGS[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_of_floats_is_exact(dtype: torch.dtype, rounding: Rounding) -> None:
    torch.manual_seed(1)
    x = (torch.randn(40, 333) * torch.logspace(-34, 20, 40).unsqueeze(1)).to(dtype)
    x[7] = 0
    actual, expected = quantise_tokens(x, rounding), reference_quantise(x, rounding)
    assert torch.equal(actual.scales, expected.scales)
    assert torch.equal(actual.codes.view(torch.uint8), expected.codes.view(torch.uint8))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_what_is_not_finite_spoils_its_token_alone(bad: float, rounding: Rounding | None) -> None:
    torch.manual_seed(2)
    x, weight = torch.randn(3, 50), torch.rand(50)
    x[1, 17] = bad
    normed = add_rms_norm(x, torch.zeros(3, 50), weight, 1e-5, rounding)
    numbers = floats(normed)
    if rounding is None or rounding.scale is None or math.isnan(bad):
        assert numbers[1].isnan().any()
    assert numbers[[0, 2]].isfinite().all()
    if rounding is not None:
        codes = floats(quantise_tokens(x, rounding))
        expected = floats(reference_quantise(x, rounding))
        assert torch.equal(codes[1].isfinite().all(), expected[1].isfinite().all())
        assert torch.equal(codes[[0, 2]], expected[[0, 2]])


def test_fused_rounding_gives_the_codes_of_rounding_afterwards() -> None:
    torch.manual_seed(3)
    x, weight, gate_up = torch.randn(6, 300).bfloat16(), torch.rand(300).bfloat16(), torch.randn(6, 500).bfloat16()
    for rounding in ROUNDINGS[1:]:
        for make in (
            lambda rounding: add_rms_norm(x, torch.zeros(6, 300), weight, 1e-5, rounding),
            lambda rounding: silu_mul(gate_up, rounding),
        ):
            at_once, plain = make(rounding), make(None)
            afterwards = quantise_tokens(plain, rounding)
            assert torch.equal(at_once.codes.view(torch.uint8), afterwards.codes.view(torch.uint8))
            assert torch.equal(at_once.scales, afterwards.scales)
