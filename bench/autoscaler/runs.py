"""Runs of the simulator, each done once: what was run before with the same code and the same inputs is read back.

work = (scenario, seed) ──► trace ──► smallest static ──► for each cold start: oracle, and every contender
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

import autoscaler
from autoscaler.decision import Policy
from autoscaler.simulate import (
    Curve,
    Result,
    Setup,
    Slo,
    Trace,
    WorldOptions,
    load_trace,
    make_policy,
    read_curve,
    simulate,
)
from autoscaler.simulate.baselines import BASELINES
from autoscaler.simulate.oracle import Search
from autoscaler.simulate.provision import fluid_gpu_hours, smallest_static
from bench.autoscaler.protocol import COLD_STARTS, CURVES, MAX_FACTOR, Scenario

OURS = "ours"
# Of every run, so that the same requests are scored whatever the cold start: the longest of them and two minutes
WARMUP_SECONDS = max(COLD_STARTS) + 120.0
# Files of the simulator that change no run
ASIDE = ("__init__.py", "__main__.py", "oracle.py", "plot.py", "policies.py", "reference.py")


class Contender(msgspec.Struct, frozen=True):
    """A policy with its parameters; `variant` is what tables call it."""

    policy: str
    variant: str
    parameters: Mapping[str, Any]


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one; shares are of the scored requests, `unscalable` is the share of violations soon after a jump of
    demand, `fluid_gpu_hours` is what the work takes if it could be spread evenly."""

    scenario: str
    curve: str
    cold_start_seconds: float
    seed: int
    contender: Contender
    requests: int
    violations: float
    lost: float
    unscalable: float
    gpu_hours: float
    static_gpu_hours: float
    fluid_gpu_hours: float
    wait_p50_seconds: float
    wait_p99_seconds: float
    scale_outs: int
    scale_ins: int
    max_ready: int


class Cache:
    """Runs by what they depend on: names, parameters, the file of the curve, the code that simulates and decides."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, scenario: Scenario, cold_start: float, seed: int, contender: Contender) -> Path:
        curve = hashlib.sha256(CURVES[scenario.curve].read_bytes()).hexdigest()
        inputs = (msgspec.to_builtins(scenario), cold_start, seed, contender, curve, code_hash(contender.policy))
        return self._folder / f"{hashlib.sha256(msgspec.json.encode(inputs, order='sorted')).hexdigest()[:32]}.json"

    def get(self, path: Path) -> Run | None:
        try:
            return msgspec.json.decode(path.read_bytes(), type=Run)
        except (OSError, msgspec.DecodeError, msgspec.ValidationError):
            return None

    def put(self, path: Path, run: Run) -> None:
        unfinished = path.with_suffix(".part")
        unfinished.write_bytes(msgspec.json.encode(run))
        unfinished.replace(path)


@lru_cache
def code_hash(policy: str) -> str:
    """Of the sources that a run of this policy depends on."""
    root = Path(str(autoscaler.__file__)).parent
    paths = [root / f"{name}.py" for name in ("decision", "fleet", "settings")]
    paths += [path for path in (root / "simulate").glob("*.py") if path.name not in ASIDE]
    if policy in BASELINES:
        paths += [root / "simulate" / "baselines" / f"{name}.py" for name in ("signals", "hpa", policy)]
    elif policy == OURS:
        paths += (root / "policy").rglob("*.py")
    elif policy == "oracle":
        paths.append(root / "simulate" / "oracle.py")
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(without_words(path.read_text()).encode())
    return digest.hexdigest()


def without_words(source: str) -> str:
    """What a source does: comments and docstrings are not part of it."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
    return ast.dump(tree)


class Work:
    """All runs of one scenario with one seed. What is not needed is not read: a run from the cache costs nothing."""

    def __init__(self, scenario: Scenario, seed: int, cache: Cache, traces: Path) -> None:
        self._scenario, self._seed, self._cache, self._traces = scenario, seed, cache, traces
        self._loaded: tuple[Trace, Curve, Slo] | None = None
        self._static: tuple[int, Result] | None = None

    def run(self, contenders: Iterable[Contender], cold_starts: Sequence[float], oracle: bool) -> list[Run]:
        runs = []
        references = [Contender("static", "", {})] + [Contender("oracle", "", {})] * oracle
        for reference in references:
            found = [self._cache.get(self._path(cold_start, reference)) for cold_start in cold_starts]
            runs += [run for run in found if run is not None]
            if None in found:
                runs = [run for run in runs if run.contender != reference]
                runs += self._references(reference, cold_starts)
        for contender in contenders:
            for cold_start in cold_starts:
                path = self._path(cold_start, contender)
                run = self._cache.get(path)
                if run is None:
                    run = self._contest(contender, cold_start)
                    self._cache.put(path, run)
                runs.append(run)
        return runs

    def _path(self, cold_start: float, contender: Contender) -> Path:
        return self._cache.path(self._scenario, cold_start, self._seed, contender)

    @property
    def _inputs(self) -> tuple[Trace, Curve, Slo]:
        if self._loaded is None:
            curve = read_curve(CURVES[self._scenario.curve])
            trace = load_trace(self._scenario.trace, self._traces, self._seed)
            self._loaded = trace, curve, self._scenario.slo(trace, curve)
        return self._loaded

    @property
    def _smallest(self) -> tuple[int, Result]:
        if self._static is None:
            self._static = smallest_static(*self._inputs, WorldOptions(warmup_seconds=WARMUP_SECONDS), self._seed)
        return self._static

    def _options(self, cold_start: float) -> WorldOptions:
        replicas = self._smallest[0]
        return WorldOptions(
            initial_replicas=replicas,
            max_replicas=MAX_FACTOR * replicas,
            cold_start_seconds=cold_start,
            warmup_seconds=WARMUP_SECONDS,
        )

    def _references(self, reference: Contender, cold_starts: Sequence[float]) -> list[Run]:
        """Static, which no cold start touches, or the clairvoyant, whose plan for one starts the next search."""
        runs, plan = [], None
        for cold_start in cold_starts:
            options, result = self._options(cold_start), self._smallest[1]
            if reference.policy == "oracle":
                found = Search(*self._inputs, options, self._seed, self._smallest).run(plan)
                result, plan = found.result, found.plan or plan
            runs.append(self._record(reference, cold_start, result))
            self._cache.put(self._path(cold_start, reference), runs[-1])
        return runs

    def _contest(self, contender: Contender, cold_start: float) -> Run:
        trace, curve, slo = self._inputs
        options = self._options(cold_start)
        policy = make(contender, Setup(trace, curve, slo, options))
        result = simulate(trace, policy, curve, slo, options, self._seed, contender.policy)
        return self._record(contender, cold_start, result)

    def _record(self, contender: Contender, cold_start: float, result: Result) -> Run:
        return Run(
            scenario=self._scenario.name,
            curve=self._scenario.curve,
            cold_start_seconds=cold_start,
            seed=self._seed,
            contender=contender,
            requests=result.scored_requests,
            violations=result.violations,
            lost=result.lost,
            unscalable=result.unscalable,
            gpu_hours=result.gpu_hours,
            static_gpu_hours=self._smallest[1].gpu_hours,
            fluid_gpu_hours=fluid_gpu_hours(*self._inputs, self._options(cold_start)),
            wait_p50_seconds=result.wait_p50,
            wait_p99_seconds=result.wait_p99,
            scale_outs=result.scale_outs,
            scale_ins=result.scale_ins,
            max_ready=result.max_ready,
        )


def make(contender: Contender, setup: Setup) -> Policy:
    if contender.policy == OURS:
        return make_policy(OURS, setup)
    return BASELINES[contender.policy](contender.parameters, setup.settings)


def run_all(
    scenarios: Sequence[Scenario],
    seeds: Sequence[int],
    contenders: Mapping[str, Sequence[Contender]],
    *,
    cold_starts: Sequence[float] = COLD_STARTS,
    oracle: bool,
    cache: Cache,
    traces: Path,
    part: tuple[int, int] = (1, 1),
) -> list[Run]:
    """Every contender of a curve in every scenario of it; or the first, second … of so many parts of that work."""
    runs = []
    every = [(scenario, seed) for scenario in scenarios for seed in seeds]
    for number, (scenario, seed) in enumerate(every):
        if number % part[1] == part[0] - 1:
            print(
                f"{number + 1}/{len(every)}: {scenario.curve} {scenario.name}, seed {seed}", file=sys.stderr, flush=True
            )
            runs += Work(scenario, seed, cache, traces).run(contenders[scenario.curve], cold_starts, oracle)
    return runs
