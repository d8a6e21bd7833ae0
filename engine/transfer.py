"""Numbers between host and device without waiting: the one place that knows pinned memory and events.

    host numbers ──to_device──► tensor        in the order of the device's work; the host goes on at once
    tensor ──Arrival──► host tensor           copied behind the work that makes it; `wait` is where the host waits

A copy from or to memory that is not pinned first waits for all work of the device. Pinned memory comes from torch's own
allocator, which gives a block out again only when the copies that used it have ended. A CPU needs none of this: there
the tensor itself is the copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(numbers: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of (nested) host numbers on the device."""
    if device.type == "cpu":
        return torch.tensor(numbers, dtype=dtype)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def bytes_to_device(data: bytes, device: torch.device) -> Tensor:
    """A uint8 tensor of them on the device."""
    there = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return there if device.type == "cpu" else there.pin_memory().to(device, non_blocking=True)


class Arrival:
    """Tensors on their way to the host. They must not be written again by the host."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._copied: torch.cuda.Event | None = None
        if tensors[0].device.type == "cuda":
            pinned = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
            self._tensors = tuple(
                there.copy_(tensor, non_blocking=True) for there, tensor in zip(pinned, tensors, strict=True)
            )
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> tuple[Tensor, ...]:
        """The same numbers in host memory."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensors
