"""`python -m bench.step_costs`: what a step of the engine costs by what it computes, and how well that foretells steps.

    learned mixes ──► engine ──► the cost that it fits itself (`engine.costs`, `Load` of the typed API)
                                     │ foretells
    other mixes   ──► engine ──► time of each step, taken here ──► relative errors, by the kind of the step

The cost is the engine's own, read from its statistics after mixes of a grid: prompts alone, batches of every size at
short and long contexts, and prompts that join batches. The check knows nothing of that fit: requests of random lengths
arrive at random, and each step's time and size are noted between the scheduler and the runner, outside of what the
engine notes itself.

On a shared machine: with one thread on a CPU time is the CPU time of this process, of which what else runs on the core
takes none; else it is the clock of the wall. All requests come again in each round, at the same steps, with other
tokens; a step of the check counts with the median of its rounds. What shared caches and memory lose to others remains.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from bench.measure import Machine, percentile, this_machine, write_result
from bench.options import model_path
from engine.config import EngineConfig
from engine.core import EngineCore, Pending, StepRunner
from engine.costs import REFIT_STEPS, StepCost
from engine.request import Request, SamplingParams
from engine.step import Masks, StepPlan

SCHEMA = 1
CHECKED_REQUESTS = 75
# Kinds of steps that compute nothing of a prompt, by the most rows that decode in them.
DECODES = ((1, "decode 1"), (4, "decode 2-4"), (16, "decode 5-16"), (1 << 30, "decode 17+"))


class Errors(msgspec.Struct, frozen=True, kw_only=True):
    """Of what was foretold for steps that the fit has not seen.

    Attributes:
        median_relative, p90_relative: |foretold - measured| / measured.
        seconds_ratio: foretold over measured seconds of all of them together.
    """

    steps: int
    median_relative: float
    p90_relative: float
    seconds_ratio: float

    @classmethod
    def of(cls, foretold: Sequence[float], measured: Sequence[float]) -> Errors:
        relative = [abs(a - b) / b for a, b in zip(foretold, measured, strict=True)]
        return cls(
            steps=len(measured),
            median_relative=statistics.median(relative),
            p90_relative=percentile(relative, 90),
            seconds_ratio=sum(foretold) / sum(measured),
        )


class CheckedErrors(Errors, frozen=True, kw_only=True):
    """Of all steps, and by their kind."""

    kinds: dict[str, Errors]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A result file.

    Attributes:
        clock: "cpu" or "wall", see above.
        max_batch_size, max_step_tokens: requests that run at the same time, and tokens that a step computes, at most.
        kv_tokens: that the KV cache has room for.
    """

    schema: int = SCHEMA
    started_at: str  # ISO 8601, UTC
    machine: Machine
    model: str
    dtype: str
    device: str
    threads: int
    clock: str
    rounds: int
    step_cost: StepCost
    max_batch_size: int
    max_step_tokens: int
    kv_tokens: int
    error: CheckedErrors


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that is submitted before a step."""

    step: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Step:
    seconds: float
    prefill_tokens: int
    decode_rows: int
    context_tokens: int

    @classmethod
    def of(cls, plan: StepPlan, seconds: float) -> Step:
        decode_rows = sum(work.sample and len(work.token_ids) == 1 for work in plan.work)
        return cls(
            seconds=seconds,
            prefill_tokens=plan.num_tokens - decode_rows,
            decode_rows=decode_rows,
            context_tokens=sum(work.start + len(work.token_ids) for work in plan.work),
        )

    @property
    def kind(self) -> str:
        if self.prefill_tokens:
            return "prefill + decode" if self.decode_rows else "prefill"
        return next(name for most, name in DECODES if self.decode_rows <= most)

    def foretold(self, cost: StepCost) -> float:
        return (
            cost.base
            + cost.per_prefill_token * self.prefill_tokens
            + cost.per_decode_row * self.decode_rows
            + cost.per_context_token * self.context_tokens
        )


class Noted:
    """A runner that keeps what it was asked for until the step is committed."""

    def __init__(self, runner: StepRunner) -> None:
        self.info, self.adapters, self.eos_token_ids = runner.info, runner.adapters, runner.eos_token_ids
        self.launch_next, self.close = runner.launch, runner.close
        self.plans: list[StepPlan] = []

    def launch(self, plan: StepPlan, masks: Masks | None = None) -> Pending:
        self.plans.append(plan)
        return self.launch_next(plan, masks)


class Driver:
    """An engine whose steps are taken one by one."""

    def __init__(self, runner: StepRunner, config: EngineConfig, clock: Callable[[], float]) -> None:
        self._runner = Noted(runner)
        self._clock = clock
        self.info = runner.info
        self.core = EngineCore(self._runner, config, clock)
        self._requests = 0

    def run(self, arrivals: Sequence[Arrival], seed: int) -> list[Step]:
        """All steps from the first arrival until nothing is left to do; prompts are random tokens."""
        rng = random.Random(seed)
        waiting = sorted(arrivals, key=lambda each: each.step, reverse=True)
        steps: list[Step] = []
        calls, since = 0, None  # `since`: when the step before it was committed, if there was more to do
        while waiting or self.core.has_work:
            while waiting and (waiting[-1].step <= calls or not self.core.has_work):
                self.core.add(self._request(waiting.pop(), rng))
            began = self._clock()
            committed = self.core.stats().steps
            self.core.step()
            ended = self._clock()
            calls += 1
            if self.core.stats().steps > committed:
                plan = self._runner.plans.pop(0)
                if plan.work:
                    steps.append(Step.of(plan, ended - (began if since is None else since)))
                since = ended if self._runner.plans else None
            elif since is None:
                since = began
        return steps

    def _request(self, arrival: Arrival, rng: random.Random) -> Request:
        self._requests += 1
        return Request(
            request_id=str(self._requests),
            prompt_token_ids=[rng.randrange(self.info.vocab_size) for _ in range(arrival.prompt_tokens)],
            sampling=SamplingParams(max_tokens=arrival.new_tokens, temperature=0.0, ignore_eos=True),
        )


def learned_mixes(max_rows: int, longest: int) -> list[list[Arrival]]:
    """What the engine learns from: a grid."""
    rows = sorted({min(count, max_rows) for count in (1, 2, 4, 8, 16, 24, 32, max_rows)})
    mixes = [[Arrival(0, min(tokens, longest), 2)] for tokens in (16, 64, 150, 300, 512, 1000, 2000)]
    mixes += [[Arrival(0, 20, 16)] * count for count in rows]
    mixes += [[Arrival(0, min(tokens, longest), 16)] * min(count, max_rows) for count, tokens in LONG_CONTEXTS]
    for count in rows[::2]:  # prompts that join a batch
        joining = [Arrival(6 * number, min(tokens, longest), 2) for number, tokens in enumerate((30, 120, 250, 480), 1)]
        mixes.append([Arrival(0, 60, 32)] * count + joining)
    return mixes


LONG_CONTEXTS = ((1, 2000), (2, 900), (4, 1000), (8, 400), (16, 200), (32, 200))  # rows, tokens of their prompts


STEPS_BETWEEN = (20.0, 6.0, 0.5)  # two arrivals of the check on average, in its thirds


def checked_mix(requests: int, longest: int, seed: int = 7) -> list[Arrival]:
    """Requests whose lengths are spread over orders of magnitude, arriving at random, faster and faster."""
    rng, arrivals, step = random.Random(seed), [], 0.0
    for number in range(requests):
        step += rng.expovariate(1 / STEPS_BETWEEN[number * len(STEPS_BETWEEN) // requests])
        arrivals.append(Arrival(int(step), min(longest, int(8 * 150 ** rng.random())), int(6 * 20 ** rng.random())))
    return arrivals


def measure(driver: Driver, rounds: int) -> tuple[StepCost, CheckedErrors]:
    """The cost after as many rounds of the grid, and its errors on steps that each count with the median of as many."""
    info = driver.info
    longest = info.max_model_len - 64
    mixes = learned_mixes(info.max_batch_size, longest)
    driver.run([Arrival(0, 40, 4)] * min(4, info.max_batch_size), seed=0)  # warm
    for number in range(rounds):
        print(f"learning, round {number + 1} of {rounds}", file=sys.stderr)
        for mix in mixes:
            driver.run(mix, seed=1 + number)
    while not any(msgspec.structs.astuple(cost := driver.core.stats().step_cost)):  # of so few steps there is none yet
        driver.run([Arrival(0, 20, REFIT_STEPS // 4)], seed=0)
    checked = checked_mix(CHECKED_REQUESTS, longest)
    runs = []
    for number in range(rounds):
        print(f"checking, round {number + 1} of {rounds}", file=sys.stderr)
        runs.append(driver.run(checked, seed=1001 + number))
    return cost, check(cost, runs)


def check(cost: StepCost, runs: Sequence[Sequence[Step]]) -> CheckedErrors:
    """Errors on steps that were taken once in each run.

    Raises:
        ValueError: the runs did not take the same steps.
    """
    foretold: dict[str, list[float]] = {}
    measured: dict[str, list[float]] = {}
    for same in zip(*runs, strict=True):
        if len({(each.prefill_tokens, each.decode_rows, each.context_tokens) for each in same}) > 1:
            raise ValueError("the rounds did not take the same steps")
        kind = same[0].kind
        foretold.setdefault(kind, []).append(same[0].foretold(cost))
        measured.setdefault(kind, []).append(statistics.median(each.seconds for each in same))
    kinds = {kind: Errors.of(foretold[kind], measured[kind]) for kind in sorted(measured)}
    every = Errors.of(*([second for each in sides.values() for second in each] for sides in (foretold, measured)))
    return CheckedErrors(kinds=kinds, **msgspec.structs.asdict(every))


@click.command(context_settings={"show_default": True})
@click.option("--model", default="smollm2-135m-instruct", help="a .gguf file, a folder, or a name of the catalogue")
@click.option("--dtype", default="auto", help="auto, bfloat16 or float32")
@click.option("--device", default="auto", help="auto, cpu or cuda")
@click.option(
    "--threads", type=click.IntRange(1), default=1, help="of the engine; with one on a CPU, its CPU time counts"
)
@click.option("--rounds", type=click.IntRange(1), default=3, help="of the mixes learned from, and of those checked")
@click.option("--max-batch-size", type=click.IntRange(1), default=32, help="requests that run at the same time")
@click.option("--max-batch-tokens", type=click.IntRange(1), default=512, help="token budget of a step")
@click.option("--json", type=click.Path(path_type=Path), help="also write the result to this file")
def main(
    model: str,
    dtype: str,
    device: str,
    threads: int,
    rounds: int,
    max_batch_size: int,
    max_batch_tokens: int,
    json: Path | None,
) -> None:
    """Measure what a step of the engine costs by what it computes."""
    from engine.parallel.leader import load_runner

    path = model_path(model)
    config = EngineConfig(
        model_path=str(path),
        dtype=dtype,
        device=device,
        threads=threads,
        max_batch_size=max_batch_size,
        max_batch_tokens=max_batch_tokens,
        max_draft_tokens=0,  # greedy texts of random prompts end in loops, which nobody would ask for
    )
    started_at, machine = datetime.now(UTC).isoformat(timespec="seconds"), this_machine()
    runner = load_runner(config, lambda phase, done: None)
    try:
        alone = runner.info.device == "cpu" and threads == 1
        driver = Driver(runner, config, time.process_time if alone else time.perf_counter)
        cost, error = measure(driver, rounds)
    finally:
        runner.close()
    info = runner.info
    result = Result(
        started_at=started_at,
        machine=machine,
        model=path.name,  # where it lies is nobody's business
        dtype=info.dtype,
        device=info.device_name or info.device,
        threads=threads,
        clock="cpu" if alone else "wall",
        rounds=rounds,
        step_cost=cost,
        max_batch_size=info.max_batch_size,
        max_step_tokens=info.max_batch_tokens,
        kv_tokens=info.kv_pages * info.page_size,
        error=error,
    )
    if json is not None:
        write_result(json, result)
    show(result, Console())


def show(result: Result, console: Console) -> None:
    """The cost, and a line for each kind of step."""
    cost, error = result.step_cost, result.error
    console.print(
        f"{result.model}, {result.dtype} on {result.device}, {result.threads} threads: a step takes "
        f"{1e3 * cost.base:.2f} ms, {1e6 * cost.per_prefill_token:.1f} us per prefill token, "
        f"{1e6 * cost.per_decode_row:.1f} us per row that decodes, "
        f"{1e6 * cost.per_context_token:.3f} us per token of context"
    )
    table = Table(title="steps that the fit has not seen", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("kind")
    for column in ("steps", "error p50", "error p90", "foretold / measured"):
        table.add_column(column, justify="right")
    for kind, each in (*error.kinds.items(), ("all", error)):
        errors = (f"{each.median_relative:.1%}", f"{each.p90_relative:.1%}", f"{each.seconds_ratio:.3f}")
        table.add_row(kind, str(each.steps), *errors)
    console.print(table)
    console.print(f"{result.clock} time; load average before: {result.machine.load_average:.2f}")


if __name__ == "__main__":
    main()
