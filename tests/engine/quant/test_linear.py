"""Every weight format against the plain product, for any number of rows and any shape."""

from __future__ import annotations

import pytest
import torch

from engine.ops import Kernels, load_kernels
from engine.quant.linear import BlockedLinear, DenseLinear, Linear, PackedLinear, make_linear

SHAPES = [(64, 32), (960, 576), (97, 48), (1, 7), (130, 33)]  # outputs, inputs
ROWS = (1, 2, 5, 6, 13, 130)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found = load_kernels(threads=2)
    if found is None or not found.has_linear:
        pytest.skip("this machine has no bfloat16 dot products, or no compiler")
    return found


def check(linear: Linear, weight: torch.Tensor, bias: torch.Tensor | None, wide: bool) -> None:
    for rows in ROWS:
        x = torch.randn(rows, weight.shape[1]).to(weight.dtype)
        exact = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
        y = linear(x)
        assert y.dtype == (torch.float32 if wide else weight.dtype)
        rounded = weight.dtype == torch.bfloat16 and not (wide and isinstance(linear, BlockedLinear))
        tolerance = {"rtol": 2**-8, "atol": 1e-3} if rounded else {"rtol": 1e-5, "atol": 1e-4}
        torch.testing.assert_close(y.double(), exact, **tolerance)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocked_products_are_the_plain_ones(
    kernels: Kernels, shape: tuple[int, int], with_bias: bool, wide: bool
) -> None:
    torch.manual_seed(shape[0])
    weight, bias = torch.randn(shape).bfloat16(), torch.randn(shape[0]).bfloat16() if with_bias else None
    check(BlockedLinear(weight, bias, wide, kernels), weight, bias, wide)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_and_dense_products_are_the_plain_ones(shape: tuple[int, int], dtype: torch.dtype, wide: bool) -> None:
    torch.manual_seed(shape[0])
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    for kind in (PackedLinear, DenseLinear):
        check(kind(weight, bias, wide), weight, bias, wide)


def test_a_row_does_not_depend_on_its_batch(kernels: Kernels) -> None:
    torch.manual_seed(0)
    linear = BlockedLinear(torch.randn(200, 96).bfloat16(), None, True, kernels)
    x = torch.randn(29, 96).bfloat16()
    assert torch.equal(linear(x), torch.cat([linear(row.unsqueeze(0)) for row in x]))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_blocked_weight_gives_its_rows_back(kernels: Kernels, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape).bfloat16()
    index = torch.randint(0, shape[0], (20,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(BlockedLinear(weight, None, True, kernels).rows(index), weight[index])


def test_the_head_of_a_bfloat16_model_gives_unrounded_float32(kernels: Kernels) -> None:
    head = make_linear(torch.randn(100, 64).bfloat16(), kernels=kernels, wide=True)
    logits = head(torch.randn(2, 64).bfloat16())
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_bytes_are_those_of_the_matrix(kernels: Kernels) -> None:
    weight = torch.zeros(128, 64)
    assert make_linear(weight).nbytes == 128 * 64 * 4
    assert make_linear(weight.bfloat16(), kernels=kernels).nbytes == 128 * 64 * 2
