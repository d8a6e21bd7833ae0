"""What ranks say to one another in the middle of a step: sums and joins of tensors, on the device.

`torch.distributed` carries it, by NCCL between GPUs and by gloo on a CPU. Ranks find one another through a file in a
private folder; what they listen on is bound to the loopback interface, and they are on one machine always.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import EngineConfigError
from engine.machine import choose_device

WAIT = timedelta(seconds=120)  # for a rank that is late: they have the same work, and start a step within milliseconds


class Communicator(Protocol):
    """One rank's end. All ranks call the same methods in the same order, with tensors of the same shapes."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over all ranks, on each of them. x may be overwritten."""

    def gather_logits(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """[T, widths[rank]] of each rank -> [T, sum(widths)] on all of them."""

    def from_first(self, x: Tensor) -> Tensor:
        """Rank 0's x, on all ranks. x may be overwritten."""

    def least(self, numbers: Sequence[int]) -> list[int]:
        """The least of each number over all ranks."""


class GroupCommunicator:
    """`Communicator` over the process group of torch.distributed, of which a process has one."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.device.type == "cuda":
            dist.all_reduce(x)
            return x
        # A ring adds in an order that depends on where a number stands in x, and so on the batch. On a CPU no bit of a
        # token depends on its batch: the parts are added in the order of the ranks, in float32, and rounded once.
        parts = self._gather(x)
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        return total.to(x.dtype)

    def gather_logits(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        padded = x.new_zeros(len(x), max(widths))
        padded[:, : x.shape[1]] = x
        return torch.cat([part[:, :width] for part, width in zip(self._gather(padded), widths, strict=True)], dim=1)

    def from_first(self, x: Tensor) -> Tensor:
        dist.broadcast(x, 0)
        return x

    def least(self, numbers: Sequence[int]) -> list[int]:
        found = torch.tensor(numbers, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return list(map(int, found.tolist()))

    def abort(self) -> None:
        """Break off what this rank waits for. From any thread."""
        if (group := dist.group.WORLD) is not None:
            group.abort()

    def close(self) -> None:
        """Without the others: they end by themselves."""
        self.abort()
        dist.destroy_process_group()

    def _gather(self, x: Tensor) -> Tensor:
        """Those of all ranks, one after the other: [size, *x.shape]."""
        parts = x.new_empty(self.size, *x.shape)
        dist.all_gather(list(parts), x.contiguous())
        return parts


def device_of_rank(name: str, rank: int, size: int) -> torch.device:
    """The device of one rank for "auto", "cpu" or "cuda".

    Raises:
        EngineConfigError: there are fewer GPUs than ranks, or no such device.
    """
    device = choose_device(name)
    if device.type != "cuda":
        return device
    if (count := torch.cuda.device_count()) < size:
        raise EngineConfigError(f"tensor_parallel_size: {size} needs a GPU for each rank, but torch sees {count} here")
    return torch.device("cuda", rank)


def connect(store: Path, rank: int, size: int, device: torch.device) -> GroupCommunicator:
    """Meet the other ranks. Returns when all are there.

    Args:
        store: a file that none but the ranks can reach, new for each group.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    backend, bound = "gloo", None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend, bound = "nccl", device  # with a device its buffers are taken now, before free memory is divided
    dist.init_process_group(
        backend, init_method=store.absolute().as_uri(), rank=rank, world_size=size, timeout=WAIT, device_id=bound
    )
    return GroupCommunicator(device)
