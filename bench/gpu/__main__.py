"""`python -m bench.gpu`: every GPU kernel against its reference, and the whole engine beside the limits of this card.

    limits ─┬─► step, attention, sampler, linear     kernels: error, tolerance, time, share of the limit
            ├─► fp8, bf16, int4                      the 12.2 B NeMo of random weights, eager and with graphs
            └─► transformers                         its continuous batching on the same shape

One command, eight minutes at most, no downloads and no weights. Beside torch and Triton it needs what the engine does,
msgspec and llguidance.

Each part is a process of its own that adds to the result file as it goes: a kernel that breaks the device, or hangs,
is named, and another process goes on behind it. What is wrong is counted and never stops the run. Exit code: 0, or 1 if
a kernel was wrong or a part broke, or 2 if there is no GPU that could be measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench.gpu.attention_cases import attention_cases
from bench.gpu.baseline import measure_baseline
from bench.gpu.engine import EngineBench
from bench.gpu.kernels import CASE_SECONDS, HUNG, find_bench, try_cases
from bench.gpu.limits import TURNS, Timer, measure_limits, this_card
from bench.gpu.linear_cases import linear_cases
from bench.gpu.report import Journal, KernelResult, Report
from bench.gpu.step_cases import sampler_cases, step_cases
from bench.gpu.workload import FULL, TRIAL, Workload
from engine.limits import LEAST_CAPABILITY
from engine.ops import triton_lacks

# Most seconds of each, so that one cannot take the time of all; in this order, in case there is too little.
PARTS = {
    "limits": 30,
    "step": 60,
    "attention": 80,
    "sampler": 30,
    "linear": 90,
    "fp8": 160,
    "bf16": 100,
    "int4": 80,
    "transformers": 60,
}
CASES = {"step": step_cases, "attention": attention_cases, "sampler": sampler_cases, "linear": linear_cases}
LEAST_SECONDS = 8  # that a part needs to begin at all
GRACE_SECONDS = 20  # for what a part has in hand when its time is over; then it is ended


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    work = TRIAL if options.trial else FULL
    work = work if options.layers is None else work.with_layers(options.layers)
    device = torch.device("cpu" if options.trial else "cuda")
    deadline = time.monotonic() + options.seconds
    if options.child is not None:
        run_part(options.child, work, device, Journal.open(options.json), lambda: deadline - time.monotonic())
        return 0
    obstacle = None if options.trial else find_obstacle()
    if obstacle is not None:
        print(f"bench.gpu: {obstacle}. Nothing was measured; --trial runs the program on a CPU.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        path = options.json or Path(folder) / "gpu.json"
        report = run_all(options, work, device, path, deadline)
    return 1 if report.failures else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=420.0, help="in all; what does not fit is skipped (420)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--parts", type=_parts, default=list(PARTS), help=f"some of {','.join(PARTS)} (all)")
    parser.add_argument("--layers", type=int, help="of the model (its own)")
    parser.add_argument("--trial", action="store_true", help="a tiny model on the CPU: does this program work?")
    parser.add_argument("--child", choices=list(PARTS), help=argparse.SUPPRESS)  # one part, here and now
    return parser.parse_args(arguments)


def _parts(text: str) -> list[str]:
    wanted = text.split(",")
    unknown = [part for part in wanted if part not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: must be some of {', '.join(PARTS)}")
    return [part for part in PARTS if part in wanted or part == "limits"]


def find_obstacle() -> str | None:
    """Why nothing can be measured here."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device here"
    found = torch.cuda.get_device_capability()
    if found < LEAST_CAPABILITY:
        return f"compute capability {found} is older than {LEAST_CAPABILITY}"
    return triton_lacks()


def run_all(options: argparse.Namespace, work: Workload, device: torch.device, path: Path, deadline: float) -> Report:
    """All parts, each in a process of its own, and a last line."""
    began = time.monotonic()
    card = this_card(device)
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    report = Report(started_at=started_at, card=card, trial=options.trial, layers=work.model.num_layers)
    journal = Journal(path, report)
    journal.save()
    print(f"{card.name} {card.capability}, torch {card.torch}, triton {card.triton or 'none'}, driver {card.driver}")
    if options.trial:
        print("trial: a tiny model on the CPU; no figure below says anything about a GPU")
    for part in options.parts:
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            journal.skip(part, "no time is left")
            continue
        print(f"\n{part}", flush=True)
        journal = _run_processes(options, part, path, time.monotonic() + min(left, PARTS[part]))
    report = journal.report
    report.seconds = time.monotonic() - began
    journal.save()
    right = sum(kernel.passed for kernel in report.kernels)
    print(
        f"\n{right} of {len(report.kernels)} kernels right, {len(report.figures)} figures, {len(report.skipped)} "
        f"skipped, {len(report.faults)} parts at fault, {report.seconds:.0f} s"
    )
    return report


def _run_processes(options: argparse.Namespace, part: str, path: Path, deadline: float) -> Journal:
    """One part. A kernel that ends its process is one result; the next process goes on with the kernel behind it."""
    while True:
        broke = _run_child(options, part, path, deadline - time.monotonic())
        journal = Journal.open(path)
        if broke is None:
            return journal
        tried = journal.report.trying
        journal.report.trying = None
        if part not in CASES or tried is None:
            journal.fault(tried or part, broke)
            return journal
        if tried not in (kernel.name for kernel in journal.report.kernels):
            journal.kernel(KernelResult(name=tried, fault=broke))
        if deadline - time.monotonic() < LEAST_SECONDS:
            journal.skip(f"the rest of {part}", "no time is left")
            return journal


def _run_child(options: argparse.Namespace, part: str, path: Path, seconds: float) -> str | None:
    """What ended it before its time, None if nothing did."""
    command = [sys.executable, "-m", "bench.gpu", "--child", part, "--json", str(path), "--seconds", str(seconds)]
    command += ["--trial"] if options.trial else []
    command += [] if options.layers is None else ["--layers", str(options.layers)]
    try:
        code = subprocess.run(command, timeout=seconds + GRACE_SECONDS).returncode
    except subprocess.TimeoutExpired:
        return f"did not end within {seconds + GRACE_SECONDS:.0f} s"
    if code == HUNG and part in CASES:
        return f"did not end within {CASE_SECONDS} s"
    return None if code == 0 else f"its process ended with {code}"


def run_part(part: str, work: Workload, device: torch.device, journal: Journal, left: Callable[[], float]) -> None:
    """One part in this process; an exception becomes an entry."""
    try:
        limits = journal.report.limits
        if part == "limits":
            measure_limits(device, journal)
        elif part == "transformers":
            measure_baseline(work, device, journal, left)
        elif limits is None:
            journal.skip(part, "the card's limits are not known")
        elif part in CASES:
            torch.manual_seed(time.time_ns())  # fresh inputs each time
            cases = CASES[part](find_bench(device, work))
            try_cases(cases, journal, Timer(device, turns=1 if journal.report.trial else TURNS), limits, left)
        else:
            EngineBench(work, part, device, journal, left).run()
    except Exception as error:  # whatever it is, the other parts go on
        journal.fault(part, error)


if __name__ == "__main__":
    sys.exit(main())
