"""Quantisers: never worse than the scale that the largest number alone would give, and what is asked of their codes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.quant.matrix import Fp8Matrix, GroupMatrix
from engine.quant.quantise import E4M3_MAX, quantise_fp8, quantise_int4, quantise_int6, quantise_int8, round_e4m3
from engine.schemes import INT4_GROUP, INT8_GROUP, Kept

Quantise = Callable[[Tensor], Fp8Matrix | GroupMatrix]
SHAPES = [(3, 64), (130, 576), (70, 5120)]


def weights(kind: str, shape: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator) * 0.02
    match kind:
        case "normal":
            return normal
        case "outliers":
            return torch.where(torch.rand(shape, generator=generator) < 0.01, 30 * normal, normal)
        case "uniform":
            return torch.rand(shape, generator=generator) - 0.3
        case "tiny":
            return normal * 1e-6
        case "positive":
            return normal.abs() + 0.01
        case _:  # some rows, and some groups of others, are zeros
            normal[::3] = 0
            normal[:, :INT4_GROUP] = 0
            return normal


KINDS = ["normal", "outliers", "uniform", "tiny", "positive", "zeros"]


def errors(found: Tensor, weight: Tensor, group: int) -> Tensor:
    return (found.double() - weight).square().view(len(weight), -1, group).sum(-1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_fp8_is_the_best_of_its_scales_for_every_row(kind: str, shape: tuple[int, int]) -> None:
    weight = weights(kind, shape)
    found = quantise_fp8(weight)
    most = weight.abs().amax(1, keepdim=True)
    least = torch.full((len(weight),), torch.inf, dtype=torch.double)
    for phase in range(4):
        scale = torch.where(most > 0, most / E4M3_MAX, 1.0) * 2 ** (phase / 4)
        codes = (weight / scale).to(torch.float8_e4m3fn)
        least = torch.minimum(least, errors(codes.float() * scale, weight, shape[1]).squeeze(1))
    torch.testing.assert_close(errors(found.dequantise(), weight, shape[1]).squeeze(1), least, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_int4_never_errs_more_than_between_least_and_largest(kind: str, shape: tuple[int, int]) -> None:
    weight = weights(kind, shape)
    found = quantise_int4(weight)
    groups = weight.view(len(weight), -1, INT4_GROUP)
    low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=2.0**-24).half().float()
    low = low.half().float()
    plain = (((groups - low) / scale).round().clamp(0, 15) * scale + low).flatten(1)
    ours, plains = errors(found.dequantise(), weight, INT4_GROUP), errors(plain, weight, INT4_GROUP)
    assert (ours <= plains * (1 + 1e-4)).all()
    if kind in ("normal", "outliers", "uniform"):
        assert ours.sum() < 0.95 * plains.sum()
    assert found.codes.max() <= 15
    assert torch.equal(found.scales, found.scales.half().float())
    assert torch.equal(found.mins, found.mins.half().float())


def test_int4_keeps_what_is_on_a_grid_of_16_as_it_is() -> None:
    codes = torch.randint(0, 16, (40, 96))
    codes[:, ::16], codes[:, 1::16] = 0, 15
    scales, mins = torch.tensor(2.0**-6), torch.tensor(0.0625)
    weight = codes * scales - mins
    assert torch.equal(quantise_int4(weight).dequantise(), weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("quantise", "most_code", "shape", "group"),
    [
        (quantise_int8, 127, (130, 576), INT8_GROUP),
        (quantise_int8, 127, (7, 90), 90),
        (quantise_int6, 31, (130, 576), INT8_GROUP),
    ],
)
def test_8_and_6_bits_are_within_half_a_step_of_each_group(
    kind: str, quantise: Callable[[Tensor], GroupMatrix], most_code: int, shape: tuple[int, int], group: int
) -> None:
    weight = weights(kind, shape)
    found = quantise(weight)
    assert found.group == group
    most = weight.view(len(weight), -1, group).abs().amax(2)
    step = torch.maximum(most / most_code * (1 + 2**-11), torch.tensor(2.0**-24))  # the scale is rounded to float16
    off = (found.dequantise() - weight).abs().view(len(weight), -1, group).amax(2)
    # The largest of a group can be beyond the last step by as much as rounding made them smaller.
    assert (off <= step * (0.5 + most_code * 2**-11 + 1e-3)).all()
    assert found.codes.min() >= 1
    assert found.codes.max() <= 2 * most_code + 1


@pytest.mark.parametrize(
    ("quantise", "inputs"),
    [(quantise_fp8, 96), (quantise_int8, 64), (quantise_int8, 80), (quantise_int6, 64), (quantise_int4, 64)],
)
@pytest.mark.parametrize("most", [1e-44, 1e-40, 1e-37])
def test_weights_as_good_as_zero_stay_numbers(quantise: Quantise, inputs: int, most: float) -> None:
    weight = most * torch.linspace(-1, 1, 3 * inputs).view(3, inputs)
    assert (quantise(weight).dequantise() - weight).abs().max() < 2.0**-23


def test_rounding_to_e4m3_is_that_of_the_conversion() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()].sort().values
    between = (every[1:] + every[:-1]) / 2
    random = torch.randn(10000) * torch.logspace(-5, 2, 10000)
    for numbers in (every, between, between.nextafter(every[1:]), between.nextafter(every[:-1]), random):
        numbers = numbers.clamp(-E4M3_MAX, E4M3_MAX)
        assert torch.equal(round_e4m3(numbers), numbers.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("quantise", [quantise_fp8, quantise_int8, quantise_int6, quantise_int4])
def test_a_matrix_in_pieces_is_the_same_matrix(quantise, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights("outliers", (130, 576))
    whole = quantise(weight).dequantise()
    monkeypatch.setattr("engine.quant.quantise._CACHED", 576 * 7)
    assert torch.equal(quantise(weight).dequantise(), whole)


@pytest.mark.parametrize("inputs", [576, 90, 96])
@pytest.mark.parametrize("kept", [Kept.FP8, Kept.INT8, Kept.INT6, Kept.INT4])
def test_bytes_are_those_of_codes_scales_and_minima(kept: Kept, inputs: int) -> None:
    weight = weights("normal", (64, inputs))
    if kept is Kept.FP8:
        assert kept.nbytes(64, inputs, 2) == quantise_fp8(weight).codes.nbytes + 64 * 4
        return
    if kept is Kept.INT4 and inputs % INT4_GROUP == 0:
        found, width = quantise_int4(weight), 2
        code_bytes = found.codes.numel() // 2 + found.mins.numel() * 2
    elif kept is Kept.INT6 and inputs % INT8_GROUP == 0:
        found, width = quantise_int6(weight), 2
        code_bytes = found.codes.numel() * 6 // 8
    else:
        found = quantise_int8(weight)
        code_bytes, width = found.codes.numel(), 2 if found.group == INT8_GROUP else 4
    assert kept.nbytes(64, inputs, 2) == code_bytes + found.scales.numel() * width
