"""Float matrices to codes and scales: FP8 scaled per output, int8 and 6 bits per 64 inputs, int4 per 32.

No calibration data. Where a scale other than the largest number's own makes the sum of squared errors smaller, that is
taken; `docs/quality.md` has what it brings and what it costs. Long rows leave less to choose: of Gaussian rows in e4m3
the error shrinks by 8 % at 576 inputs, by 3 % at NeMo's 5,120. Weights are on the CPU here, whatever the device.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from engine.quant.matrix import Fp8Matrix, GroupMatrix
from engine.schemes import E4M3_MAX, INT4_GROUP, INT8_GROUP, LEAST_SCALE

_E4M3_LEAST = 2.0**-6  # normal number; below it steps stay as wide as there
_PHASES = [2 ** (step / 4) for step in range(4)]  # e4m3 has the same error, relative to the scale, an octave further
_FITS = 2  # rounds of least squares for int4; four make the error 3 % smaller again
_LEAST_HALF = 2.0**-24  # above 0 in float16
_CACHED = 2**18  # weights that stay in a core's cache while they are gone through many times


def quantise_fp8(weight: Tensor) -> Fp8Matrix:
    """float32 [outputs, inputs] -> e4m3 codes. The largest of a row is at 448 or up to 3/4 of an octave below: of four
    scales, the one with the least error."""
    pieces = [_fp8(piece) for piece in _pieces(weight)]
    return Fp8Matrix(torch.cat([piece.codes for piece in pieces]), torch.cat([piece.scales for piece in pieces]))


def quantise_int8(weight: Tensor) -> GroupMatrix:
    """float32 [outputs, inputs] -> codes 1 .. 255 about 128, the largest of a group at an end. A row is the group where
    inputs are no multiple of 64."""
    return _joined([_symmetric(piece, 8) for piece in _pieces(weight)])


def quantise_int6(weight: Tensor) -> GroupMatrix:
    """float32 [outputs, inputs], inputs a multiple of 64 -> codes 1 .. 63 about 32, likewise."""
    return _joined([_symmetric(piece, 6) for piece in _pieces(weight)])


def quantise_int4(weight: Tensor) -> GroupMatrix:
    """float32 [outputs, inputs] -> codes 0 .. 15 between the least and the largest of each group; then scale and
    minimum are fitted to the codes, and the codes to them."""
    return _joined([_int4(piece) for piece in _pieces(weight)])


def _pieces(weight: Tensor) -> tuple[Tensor, ...]:
    return torch.split(weight, max(1, _CACHED // weight.shape[1]))


def _joined(pieces: list[GroupMatrix]) -> GroupMatrix:
    codes, scales, mins = zip(*((piece.codes, piece.scales, piece.mins) for piece in pieces), strict=True)
    return replace(pieces[0], codes=torch.cat(codes), scales=torch.cat(scales), mins=torch.cat(mins))


def _fp8(weight: Tensor) -> Fp8Matrix:
    most = weight.abs().amax(dim=1, keepdim=True)
    scales = (most / E4M3_MAX).clamp(min=LEAST_SCALE) * torch.tensor(_PHASES)
    errors = []
    for scale in torch.split(scales, 1, dim=1):
        numbers = weight * scale.reciprocal()
        errors.append(torch.linalg.vector_norm(round_e4m3(numbers).sub_(numbers), dim=1) * scale.squeeze(1))
    best = torch.stack(errors, dim=1).argmin(dim=1, keepdim=True)  # the first, for rows of zeros
    chosen = scales.gather(1, best)
    return Fp8Matrix((weight / chosen).to(torch.float8_e4m3fn), chosen)


def round_e4m3(numbers: Tensor) -> Tensor:
    """float32 of magnitude <= 448 -> the nearest numbers of e4m3, as float32: ten times as fast as there and back.

    Adding 1.5 * 2 ** (e + 20) to a number of exponent e leaves the three bits behind its first.
    """
    exponent = (numbers.view(torch.int32) & 0x7F800000).view(torch.float32)
    shift = exponent.clamp_(min=_E4M3_LEAST).mul_(1.5 * 2**20)
    return torch.add(numbers, shift).sub_(shift)


def _symmetric(weight: Tensor, bits: int) -> GroupMatrix:
    group = INT8_GROUP if weight.shape[1] % INT8_GROUP == 0 else weight.shape[1]
    groups = weight.view(len(weight), -1, group)
    zero = 2 ** (bits - 1)
    most = groups.abs().amax(dim=2)
    scales = most / (zero - 1)
    scales = _half(scales.clamp_(min=_LEAST_HALF)) if group == INT8_GROUP else scales.clamp_(min=LEAST_SCALE)
    codes = (groups / scales.unsqueeze(-1)).round_().clamp_(1 - zero, zero - 1).add_(zero)
    return GroupMatrix(codes.to(torch.uint8).flatten(1), bits, group, scales, zero * scales)


def _int4(weight: Tensor) -> GroupMatrix:
    groups = weight.view(len(weight), -1, INT4_GROUP)
    low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
    scales, mins = _half(((high - low) / 15).clamp_(min=_LEAST_HALF)), _half(-low)
    codes = _codes(groups, scales, mins)
    error = _error(groups, codes, scales, mins)
    mean = groups.mean(dim=2)
    fitted = scales, mins, codes
    for _ in range(_FITS):
        centre = fitted[2].mean(dim=2)
        spread = fitted[2].square().mean(dim=2) - centre.square()
        slope = ((fitted[2] * groups).mean(dim=2) - centre * mean) / spread
        slope = _half(torch.where(spread > 0, slope, fitted[0]).clamp_(min=_LEAST_HALF))
        minimum = _half(slope * centre - mean)
        fitted = slope, minimum, _codes(groups, slope, minimum)
    better = _error(groups, fitted[2], *fitted[:2]) < error
    codes = torch.where(better.unsqueeze(-1), fitted[2], codes).to(torch.uint8).flatten(1)
    scales, mins = torch.where(better, fitted[0], scales), torch.where(better, fitted[1], mins)
    return GroupMatrix(codes, 4, INT4_GROUP, scales, mins)


def _codes(groups: Tensor, scales: Tensor, mins: Tensor) -> Tensor:
    """Nearest of 0 .. 15, as floats."""
    return (groups + mins.unsqueeze(-1)).div_(scales.unsqueeze(-1)).round_().clamp_(0, 15)


def _error(groups: Tensor, codes: Tensor, scales: Tensor, mins: Tensor) -> Tensor:
    """Of each group, a sum of squares."""
    numbers = torch.addcmul(-mins.unsqueeze(-1), codes, scales.unsqueeze(-1))
    return numbers.sub_(groups).square_().sum(dim=2)


def _half(values: Tensor) -> Tensor:
    """What float16 keeps of scales and minima."""
    return values.half().float()
