"""How fast this machine's memory is: the limit of decoding, which reads all weights once per step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import msgspec
import torch

from bench.measure import Bandwidth, Job

SIZE = 2**29  # bytes; far beyond any cache
REPEATS = 7


def measure(threads: int, device: str = "auto") -> Bandwidth:
    """Best of several copies and reads of half a gibibyte."""
    torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.ones(SIZE // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    return Bandwidth(
        copy_bytes_per_second=2 * SIZE / _seconds(lambda: target.copy_(source), device),
        read_bytes_per_second=SIZE / _seconds(lambda: source.sum(), device),
    )


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
    """Job as JSON on standard input, Bandwidth as JSON on standard output."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    sys.stdout.buffer.write(msgspec.json.encode(measure(job.threads, job.device)))


if __name__ == "__main__":
    main()
