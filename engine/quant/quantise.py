"""Float matrices to codes and scales: FP8 and int8 scaled per output, int4 per 32 inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.quant.matrix import Fp8Matrix, GroupMatrix
from engine.schemes import INT4_GROUP

E4M3_MAX = 448.0


def quantise_fp8(weight: Tensor) -> Fp8Matrix:
    """float32 [outputs, inputs] -> e4m3 codes, the largest of a row at 448."""
    most = weight.abs().amax(dim=1, keepdim=True)
    scales = torch.where(most > 0, most / E4M3_MAX, 1.0)
    return Fp8Matrix((weight / scales).to(torch.float8_e4m3fn), scales)


def quantise_int8(weight: Tensor) -> GroupMatrix:
    """float32 [outputs, inputs] -> codes 1 .. 255 about 128, the largest of a row at an end."""
    most = weight.abs().amax(dim=1, keepdim=True)
    scales = torch.where(most > 0, most / 127, 1.0)
    codes = (weight / scales).round_() + 128
    return GroupMatrix(codes.to(torch.uint8), 8, weight.shape[1], scales, 128 * scales)


def quantise_int4(weight: Tensor) -> GroupMatrix:
    """float32 [outputs, inputs] -> codes 0 .. 15 between the least and the largest of each group."""
    groups = weight.view(len(weight), -1, INT4_GROUP)
    low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
    scales = torch.where(high > low, (high - low) / 15, 1.0).half().float()
    mins = (-low).half().float()
    codes = ((groups + mins.unsqueeze(-1)) / scales.unsqueeze(-1)).round_().clamp_(0, 15)
    return GroupMatrix(codes.to(torch.uint8).flatten(1), 4, INT4_GROUP, scales, mins)
