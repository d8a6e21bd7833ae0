"""What the sampling kernels of a GPU know of each row: written when a request takes the row, read by every step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.ops import has_triton
from engine.request import SamplingParams
from engine.sampling.draw import mix
from engine.transfer import to_device

Choose = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""`engine.ops.triton.sampler.choose`."""


class DeviceRows:
    """Sampling parameters and seeds of all rows, on the device."""

    def __init__(self, max_rows: int, device: torch.device, choose: Choose) -> None:
        self._parameters = torch.zeros(max_rows, 4, dtype=torch.float64, device=device)
        self._seeds = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._device = device
        self._choose = choose

    def set(self, row: int, params: SamplingParams, seed: int, greedy: bool) -> None:
        """A request takes the row."""
        temperature = 0.0 if greedy else params.temperature
        parameters = [temperature, params.top_k, params.top_p, params.min_p]
        self._parameters[row] = to_device(parameters, torch.float64, self._device)
        mixed = mix(seed % 2**64)
        self._seeds[row].fill_(mixed - 2**64 if mixed >= 2**63 else mixed)  # `= number` would wait for the device

    def choose(self, logits: Tensor, rows: list[int], positions: list[int]) -> tuple[Tensor, Tensor]:
        """The largest logit and the next token of each row: float32 [S] and int64 [S]."""
        index, place = to_device([rows, positions], torch.int64, self._device)
        return self._choose(logits, index, place, self._parameters, self._seeds)


def find_device_rows(max_rows: int, device: torch.device) -> DeviceRows | None:
    """None where there are no kernels."""
    if not has_triton(device):
        return None
    from engine.ops.triton.sampler import choose  # needs Triton, which is not everywhere

    return DeviceRows(max_rows, device, choose)
