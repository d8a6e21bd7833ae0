"""`python -m bench.simulator`: the same requests to an engine and to its simulation, and how far their latencies agree.

    trace ──► EngineCore, one real step after the other ──► first token and end of each request
          └─► autoscaler.simulate, with the step costs of `bench.step_costs` ──► the same

Requests arrive at random, at rates from leisure to a queue that grows. The clock is the CPU time of this process, with
the time in which the engine has nothing to do left out and added: what else runs on the machine takes none of it. So
one thread on a CPU is measured, and nothing of the network or of a server around the engine. Caches and memory are
shared all the same: on a busy machine steps take longer than when their costs were measured.
"""

from __future__ import annotations

import random
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from autoscaler.simulate import Curve, Trace, load_trace, read_curve
from autoscaler.simulate.engines import Engines
from autoscaler.simulate.options import Slo
from bench.measure import Machine, this_machine, write_result
from bench.options import model_path
from engine.config import EngineConfig
from engine.core import EngineCore, StepRunner
from engine.request import Request, SamplingParams

SCHEMA = 1
PERCENTS = (50, 90, 99)
WARM = "poisson:rate=4,hours=0.001,input=100,output=10,seed=1"


class Latencies(msgspec.Struct, frozen=True, kw_only=True):
    """Percentiles 50, 90 and 99, in seconds."""

    ttft: list[float]
    itl: list[float]  # mean of each request between its tokens


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """Attributes:
    measured_seconds: of CPU time that the engine worked.
    ttft_ratio: sum of the simulated times to the first token over that of the engine's.
    ttft_correlation: of the two, request by request.
    """

    trace: str
    requests: int
    measured_seconds: float
    engine: Latencies
    simulated: Latencies
    ttft_ratio: float
    ttft_correlation: float


class Result(msgspec.Struct, frozen=True, kw_only=True):
    schema: int = SCHEMA
    started_at: str  # ISO 8601, UTC
    machine: Machine
    model: str
    curve: str  # file of the step costs, measured at another time
    cases: list[Case]


class Clock:
    """CPU time, which can be put forward."""

    def __init__(self) -> None:
        self._ahead = -time.process_time()

    def __call__(self) -> float:
        return time.process_time() + self._ahead

    def wait_for(self, moment: float) -> None:
        self._ahead += max(moment - self(), 0.0)


def engine_times(runner: StepRunner, config: EngineConfig, trace: Trace, seed: int = 1) -> tuple[Any, Any, float]:
    """When each request has its first token and its end, and for how long the engine worked. Prompts are random."""
    rng = random.Random(seed)
    requests = [
        Request(
            request_id=str(number),
            prompt_token_ids=[rng.randrange(runner.info.vocab_size) for _ in range(prompt)],
            sampling=SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True),
        )
        for number, (prompt, output) in enumerate(
            zip(trace.input_tokens.tolist(), trace.output_tokens.tolist(), strict=True)
        )
    ]
    first, end = np.full(len(trace), np.nan), np.zeros(len(trace))
    clock, began, arrived = Clock(), time.process_time(), 0
    core = EngineCore(runner, config, clock)
    while arrived < len(trace) or core.has_work:
        if not core.has_work:
            clock.wait_for(float(trace.arrival_s[arrived]))
        while arrived < len(trace) and trace.arrival_s[arrived] <= clock():
            core.add(requests[arrived])
            arrived += 1
        for event in core.step():
            which = int(event.request_id)
            end[which] = clock()
            first[which] = end[which] if np.isnan(first[which]) else first[which]
    return first, end, time.process_time() - began


def simulated_times(curve: Curve, trace: Trace) -> tuple[Any, Any]:
    engines = Engines(trace, curve, Slo(), choices=None, seed=0)
    engines.accept([slot := engines.open()])
    engines.run_to(np.inf)
    engines.look([slot])
    return engines.requests["first_token"], engines.requests["finished"]


def latencies(trace: Trace, first: Any, end: Any) -> Latencies:
    several = trace.output_tokens > 1
    gaps = ((end - first) / np.maximum(trace.output_tokens - 1, 1))[several]
    ttft, itl = (np.percentile(values, PERCENTS).round(5).tolist() for values in (first - trace.arrival_s, gaps))
    return Latencies(ttft=ttft, itl=itl)


def compare(runner: StepRunner, config: EngineConfig, curve: Curve, trace: Trace) -> Case:
    first, end, seconds = engine_times(runner, config, trace)
    also, until = simulated_times(curve, trace)
    mine, theirs = also - trace.arrival_s, first - trace.arrival_s
    return Case(
        trace=trace.name,
        requests=len(trace),
        measured_seconds=round(seconds, 3),
        engine=latencies(trace, first, end),
        simulated=latencies(trace, also, until),
        ttft_ratio=round(float(mine.sum() / theirs.sum()), 4),
        ttft_correlation=round(float(np.corrcoef(mine, theirs)[0, 1]), 4),
    )


@click.command(context_settings={"show_default": True})
@click.option("--model", default="smollm2-135m-instruct", help="a .gguf file, a folder, or a name of the catalogue")
@click.option("--curve", type=click.Path(path_type=Path), required=True, help="of that model: by bench.step_costs")
@click.option("--rates", default="0.5,2,3", help="requests per second, one case each")
@click.option("--seconds", type=click.FloatRange(1), default=60.0, help="from the first arrival of a case to the last")
@click.option("--input", "prompt", type=click.IntRange(1), default=250, help="mean tokens of a prompt")
@click.option("--output", type=click.IntRange(1), default=40, help="mean tokens of an answer")
@click.option("--json", type=click.Path(path_type=Path), help="also write the result to this file")
def main(model: str, curve: Path, rates: str, seconds: float, prompt: int, output: int, json: Path | None) -> None:
    """Compare the simulator with the engine that its step costs are of."""
    from engine.parallel.leader import load_runner

    path, costs = model_path(model), read_curve(curve)
    config = EngineConfig(
        model_path=str(path),
        device="cpu",
        threads=1,
        max_batch_size=costs.max_batch_size,
        max_batch_tokens=costs.max_step_tokens,
        max_draft_tokens=0,  # the simulator knows none
    )
    started_at, machine = datetime.now(UTC).isoformat(timespec="seconds"), this_machine()
    mix = f"hours={seconds / 3600},input={prompt},output={output},seed=3"
    runner = load_runner(config, lambda phase, done: None)
    try:
        longest = runner.info.max_model_len
        engine_times(runner, config, load_trace(WARM).within(longest), seed=2)
        traces = [load_trace(f"poisson:rate={rate},{mix}").within(longest) for rate in rates.split(",")]
        cases = [compare(runner, config, costs, trace) for trace in traces]
    finally:
        runner.close()
    result = Result(started_at=started_at, machine=machine, model=path.name, curve=costs.name, cases=cases)
    if json is not None:
        write_result(json, result)
    show(result, Console())


def show(result: Result, console: Console) -> None:
    """Two lines for each case: the engine, and the simulator. Times are milliseconds; ratio and corr. are of TTFT."""
    table = Table(title=f"{result.model}; simulated with {result.curve}", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("rate")
    table.add_column("", no_wrap=True)
    for column in ("TTFT p50", "p90", "p99", "ITL p50", "p90", "p99", "ratio", "corr."):
        table.add_column(column, justify="right")
    for case in result.cases:
        rate = case.trace.partition("rate=")[2].partition(",")[0]
        for name, side, ends in (
            ("engine", case.engine, ("", "")),
            ("simulated", case.simulated, (f"{case.ttft_ratio:.3f}", f"{case.ttft_correlation:.3f}")),
        ):
            figures = [f"{1e3 * value:.0f}" for value in (*side.ttft, *side.itl)]
            table.add_row(rate if side is case.engine else "", name, *figures, *ends)
    console.print(table)
    console.print(f"CPU time; load average before: {result.machine.load_average:.2f}")


if __name__ == "__main__":
    main()
