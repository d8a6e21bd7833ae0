"""Ranks as threads of this process: what they compute together, without a process to start."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from engine.checkpoint import open_checkpoint
from engine.model.decoder import Decoder
from engine.model.load import load_decoder
from engine.parallel.checkpoint import RankCheckpoint
from engine.parallel.communicator import Communicator
from engine.parallel.layers import join_ranks
from engine.schemes import SCHEMES
from tests.engine.oracle import teacher_forced

CPU = torch.device("cpu")
Result = TypeVar("Result")


class Table:
    """Where `size` ranks lay down a tensor each and see those of all."""

    def __init__(self, size: int) -> None:
        self._parts: list[Tensor] = [torch.empty(0)] * size
        self._barrier = threading.Barrier(size, timeout=60)

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self._parts[rank] = x.clone()
        self._barrier.wait()
        parts = list(self._parts)
        self._barrier.wait()
        return parts

    def abandon(self) -> None:
        self._barrier.abort()


@dataclass(frozen=True)
class ThreadCommunicator:
    """`Communicator`, with sums and joins as one would write them down."""

    rank: int
    size: int
    table: Table
    device: torch.device = CPU

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self.table.exchange(self.rank, x)).sum(0)

    def gather_logits(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        parts = self.table.exchange(self.rank, x)
        assert [part.shape[1] for part in parts] == list(widths)
        return torch.cat(parts, dim=1)

    def from_first(self, x: Tensor) -> Tensor:
        return self.table.exchange(self.rank, x)[0]

    def least(self, numbers: Sequence[int]) -> list[int]:
        return torch.stack(self.table.exchange(self.rank, torch.tensor(numbers))).amin(0).tolist()


def on_ranks(size: int, work: Callable[[Communicator], Result]) -> list[Result]:
    """What each of `size` ranks makes of the same work; the first error of any, if there is one."""
    table = Table(size)

    def run(rank: int) -> Result:
        try:
            return work(ThreadCommunicator(rank, size, table))
        except BaseException:
            table.abandon()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda each: isinstance(each, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]


def load_rank(
    path: Path, communicator: Communicator, precision: str = "auto", dtype: torch.dtype = torch.float32
) -> Decoder:
    """One rank's decoder, joined to the others."""
    with torch.inference_mode(), open_checkpoint(path) as checkpoint:
        source = RankCheckpoint(checkpoint, communicator.rank, communicator.size)
        join = partial(join_ranks, checkpoint.config.vocab_size, communicator)
        return load_decoder(source, dtype, CPU, 128, 1, lambda *progress: None, SCHEMES[precision], join)


def load_whole(path: Path, precision: str = "auto", dtype: torch.dtype = torch.float32) -> Decoder:
    with torch.inference_mode(), open_checkpoint(path) as checkpoint:
        return load_decoder(checkpoint, dtype, CPU, 128, 1, lambda *progress: None, SCHEMES[precision])


def divided_logits(
    path: Path, size: int, prompts: Sequence[list[int]], precision: str = "auto", dtype: torch.dtype = torch.float32
) -> list[list[Tensor]]:
    """Of each rank, the logits after every token of each prompt."""
    return on_ranks(size, lambda each: teacher_forced(load_rank(path, each, precision, dtype), prompts))
