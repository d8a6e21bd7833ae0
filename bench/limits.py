"""How fast this machine's memory and its matrix units are: what decoding and prefill can reach at most."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import msgspec
import torch

from bench.measure import Bandwidth, Job, Limits

SIZE = 2**29  # bytes; far beyond any cache
WIDTH = {"cpu": 2048, "cuda": 8192}  # of square matrices: large enough for the best kernels, some 0.1 s of work
REPEATS = 7


def measure_bandwidth(threads: int, device: str = "auto") -> Bandwidth:
    """Best of several copies and reads of half a gibibyte."""
    device = _prepare(threads, device)
    source = torch.ones(SIZE // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    return Bandwidth(
        copy_bytes_per_second=2 * SIZE / _seconds(lambda: target.copy_(source), device),
        read_bytes_per_second=SIZE / _seconds(lambda: source.sum(), device),
    )


def measure(threads: int, device: str = "auto") -> Limits:
    """Bandwidth, and the best of several products of two bfloat16 matrices."""
    device = _prepare(threads, device)
    bandwidth = measure_bandwidth(threads, device)
    width = WIDTH[device]
    left, right = (torch.randn(width, width, dtype=torch.bfloat16, device=device) for _ in range(2))
    return Limits(
        copy_bytes_per_second=bandwidth.copy_bytes_per_second,
        read_bytes_per_second=bandwidth.read_bytes_per_second,
        matrix_flops_per_second=2 * width**3 / _seconds(lambda: left @ right, device),
    )


def _prepare(threads: int, device: str) -> str:
    torch.set_num_threads(threads)
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _seconds(work: Callable[[], object], device: str) -> float:
    """The fastest of REPEATS, after one that touches the pages."""
    best = float("inf")
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def main() -> None:
    """Job as JSON on standard input, Limits as JSON on standard output."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    sys.stdout.buffer.write(msgspec.json.encode(measure(job.threads, job.device)))


if __name__ == "__main__":
    main()
