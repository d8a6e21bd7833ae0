"""Every kernel of a step against its reference on fresh random inputs, and its time, one line each.

A case runs the kernel once on inputs that the reference has seen too, compares, then times it on the same inputs. What
is wrong or does not run is counted, and the next case follows. On CUDA the kernels are Triton's; in a trial Triton's
interpreter runs them where TRITON_INTERPRET=1 is set, else the CPU's own operators are compared.
"""

from __future__ import annotations

import faulthandler
import math
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import torch
from torch import Tensor

from bench.gpu.limits import Timer
from bench.gpu.report import CardLimits, Journal, KernelResult, last_line
from bench.gpu.workload import Workload
from engine.machine import usable_cores
from engine.ops import Activations, Ops, load_kernels, select_ops

# One rounding of bfloat16 is 2 ** -8 of a number; keys, weights and probabilities that were rounded on the way add up
# like noise. One step of e4m3 is up to 2 ** -3, and a number between two codes may fall to either.
BF16_TOLERANCE = 2**-6
ATTENTION_TOLERANCE = 2**-5
CODES_TOLERANCE = 0.13
EXACT = 0.0
CASE_SECONDS = 40  # of one kernel, its reference and all that has to be compiled; more is a kernel that hangs
HUNG, LOST = 1, 3  # exit codes: faulthandler's own, and that of a process whose device has failed


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel on one shape.

    Attributes:
        expected: what the reference makes of the inputs, which it leaves as they are.
        run: the kernel; what its first call gives is compared, later ones are timed.
        outputs: of what it gave, the tensors to compare.
        nbytes, flops: that it has to move and to compute at least.
        fp8: the matrix units of FP8 do it.
    """

    expected: Callable[[], list[Tensor]]
    run: Callable[[], Any]
    outputs: Callable[[Any], list[Tensor]]
    tolerance: float
    nbytes: int
    flops: float = 0.0
    fp8: bool = False


Named = tuple[str, Callable[[], Case]]
"""A case by its name; its inputs are made when it is tried."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Where cases are tried, and on what shapes.

    Attributes:
        dtype: of activations: bfloat16; float32 where the CPU's own operators are compared.
        triton: the kernels are Triton's.
    """

    device: torch.device
    dtype: torch.dtype
    workload: Workload
    ops: Ops
    triton: bool

    @property
    def interpreted(self) -> bool:
        return self.triton and self.device.type != "cuda"

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)


def find_bench(device: torch.device, workload: Workload) -> Bench:
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        from engine.ops.triton import TritonOps  # needs Triton, which is not everywhere

        return Bench(device, torch.bfloat16, workload, TritonOps((9, 0)), triton=True)
    kernels = load_kernels(usable_cores()) if device.type == "cpu" else None
    cuda = device.type == "cuda"
    return Bench(device, torch.bfloat16 if cuda else torch.float32, workload, select_ops(kernels, device), triton=cuda)


def try_cases(
    cases: Iterator[Named], journal: Journal, timer: Timer, limits: CardLimits, left: Callable[[], float]
) -> None:
    """Each in turn that has no result yet, as long as there is time.

    Raises:
        SystemExit: the device itself has failed, so that nothing on it can be trusted in this process any more.
    """
    tried = {kernel.name for kernel in journal.report.kernels}
    cuda = torch.cuda.is_available()
    for name, make in cases:
        if name in tried:
            continue
        if left() <= 0:
            journal.skip(name, "no time is left")
            continue
        journal.begin(name)
        if cuda:
            faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)  # a kernel that hangs ends with the process
        result, lost = try_case(name, make, timer, limits), None
        if cuda:
            lost = _lost()
            faulthandler.cancel_dump_traceback_later()
        if lost is not None:
            journal.kernel(msgspec.structs.replace(result, fault=result.fault or lost))
            raise SystemExit(LOST)
        journal.kernel(result)
        journal.end()


def _lost() -> str | None:
    """What has ended this process's device for good, as an illegal access does; waits for all that was launched."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return last_line(error)
    return None


@torch.inference_mode()
def try_case(name: str, make: Callable[[], Case], timer: Timer, limits: CardLimits) -> KernelResult:
    """Compare and time one kernel; whatever it raises is in the result."""
    error = tolerance = None
    try:
        case = make()
        tolerance = case.tolerance
        expected = case.expected()
        error = largest_error(case.outputs(case.run()), expected)
        del expected
        if math.isinf(error):
            return KernelResult(name=name, tolerance=tolerance, fault="the result is not finite")
        seconds = timer.seconds(case.run)
    except Exception as fault:  # a kernel may fail in any way; the others shall be seen nevertheless
        traceback.print_exception(fault)
        return KernelResult(name=name, tolerance=tolerance, error=error, fault=last_line(fault))
    peak = limits.fp8_flops_per_second if case.fp8 else None
    least = max(case.nbytes / limits.copy_bytes_per_second, case.flops / (peak or limits.matrix_flops_per_second))
    return KernelResult(
        name=name,
        tolerance=tolerance,
        error=error,
        seconds=seconds,
        bytes_per_second=case.nbytes / seconds,
        flops_per_second=case.flops / seconds,
        share=least / seconds,
    )


def largest_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Of |actual - expected| / (|expected| + rms of expected), over all vectors; infinite where one is not finite.

    A vector is what the last dimension has: of attention, small where a token sees much, large where it sees little.
    """
    worst = 0.0
    for one, other in zip(actual, expected, strict=True):
        one, other = one.double(), other.double()
        rms = other.square().mean(-1, keepdim=True).sqrt()
        error = ((one - other).abs() / (other.abs() + rms).clamp(min=1e-30)).max().item()
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def numbers(x: Activations) -> Tensor:
    """What activations stand for."""
    return x if isinstance(x, Tensor) else x.codes.float() * x.scales.unsqueeze(-1)


def named(name: str, make: Callable[..., Case], *args: object) -> Named:
    return name, partial(make, *args)
