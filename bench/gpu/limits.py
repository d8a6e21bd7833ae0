"""Time on the device, and what the card can do at best: the yardstick of every other figure.

A kernel is timed by events around it. Before each turn a buffer larger than any cache is overwritten, so that inputs
come from memory as they do between the layers of a model, and the card is given a millisecond of idle work, in which
the host has queued the kernel: what is timed is the kernel and not its launch.
"""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import subprocess
import time
from collections.abc import Callable

import msgspec
import torch
from torch import Tensor

from bench.gpu.report import Card, CardLimits, Journal
from engine.quant import has_fp8_units

FLUSH_BYTES = 2**28  # an H100 has 50 MB of L2, a B200 126 MB
WAIT_CYCLES = 2_000_000  # about 1 ms: more than Python takes to queue a few launches
TURNS = 7


class Timer:
    """Median seconds of work on one device, of so many turns."""

    def __init__(self, device: torch.device, turns: int = TURNS) -> None:
        self._device, self._turns = device, turns
        self._flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Of work that was done once before, so that its kernels are compiled."""
        return statistics.median(self._turn(work) for _ in range(self._turns))

    def _turn(self, work: Callable[[], object]) -> float:
        if self._device.type != "cuda":
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._flush.zero_()
        torch.cuda._sleep(WAIT_CYCLES)  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000  # CUDA tells milliseconds


def measure_limits(device: torch.device, journal: Journal) -> None:
    """Copy, read, and products of square matrices, in the median of several turns; of a trial on sizes that take a
    moment. Units of FP8 that cannot be measured are a fault, and the others go without them."""
    timer, cuda, trial = Timer(device), device.type == "cuda", journal.report.trial

    def rate(amount: float, work: Callable[[], object]) -> float:
        work()
        return amount / timer.seconds(work)

    size, width = (2**22, 256) if trial else (2**31, 8192)
    source = torch.ones(size // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(width, width, device=device, dtype=_matrix_type(cuda)) for _ in range(2))
    flops = 2.0 * width**3
    limits = CardLimits(
        copy_bytes_per_second=rate(2 * size, lambda: target.copy_(source)),
        read_bytes_per_second=rate(size, lambda: source.view(torch.float32).sum()),
        matrix_flops_per_second=rate(flops, lambda: left @ right),
        fp8_flops_per_second=None,
    )
    try:
        if has_fp8_units(device):
            limits = msgspec.structs.replace(limits, fp8_flops_per_second=rate(flops, _fp8_product(left, right)))
    except Exception as error:  # of torch's own product, in any version
        journal.fault("limits of FP8", error)
    journal.limits(limits)


def _fp8_product(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    """With a scale per row and per column, as W8A8 has them."""
    codes = left.to(torch.float8_e4m3fn), right.t().contiguous().to(torch.float8_e4m3fn).t()  # columns in one piece
    ones = torch.ones(len(left), 1, device=left.device)
    return lambda: torch._scaled_mm(*codes, scale_a=ones, scale_b=ones.t(), out_dtype=torch.bfloat16)


def this_card(device: torch.device) -> Card:
    """The exact names that figures belong to."""
    cuda = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if cuda else None
    return Card(
        name=properties.name if properties else platform.processor() or platform.machine(),
        capability=f"{properties.major}.{properties.minor}" if properties else "",
        memory_bytes=properties.total_memory if properties else 0,
        driver=_driver() if cuda else "",
        cuda=torch.version.cuda or "",
        torch=str(torch.__version__),
        triton=_version("triton"),
        python=platform.python_version(),
    )


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _matrix_type(cuda: bool) -> torch.dtype:
    return torch.bfloat16 if cuda else torch.float32
