"""`python -m bench.autoscaler`: who keeps the promise at what price. `bench.autoscaler.protocol` says by which rules.

    tune ──► frozen.json, and a result file with every configuration that was tried
    score ──► every contender on other traces: a result file, a table (.md) and a picture (.svg) beside it

What was run is kept, so that a run that was stopped goes on where it was; `--part 1/2` and `--part 2/2` in two
processes share the work, and a run without it puts all together.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import msgspec

from autoscaler.simulate import read_curve
from bench.autoscaler.protocol import COLD_STARTS, CURVES, HELD_OUT, RESULTS, SEEDS, TUNING, TUNING_SEEDS, Scenario
from bench.autoscaler.report import Score, Tuning, choices, markdown, plot, rows
from bench.autoscaler.runs import OURS, Cache, Contender, run_all
from bench.autoscaler.spaces import SPACES, configurations
from bench.measure import this_machine, write_result
from bench.options import names

FROZEN = Path(__file__).parent / "frozen.json"
EVERYONE = [OURS, *SPACES]
CACHE = Path.home() / ".cache" / "nemoserve" / "bench" / "autoscaler"
_ROOT = Path(__file__).resolve().parent.parent.parent
TRACES = Path(os.environ.get("NEMOSERVE_TEST_DATA", _ROOT.parent / "shared" / "data")) / "traces"


def read_part(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int]:
    number, _, count = value.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise click.BadParameter(f"{value!r} is not like 1/2")
    return int(number), int(count)


@click.group(context_settings={"show_default": True})
@click.option("--traces", type=click.Path(path_type=Path), default=TRACES, help="folder of the recorded traces")
@click.option("--cache", type=click.Path(path_type=Path), default=CACHE, help="folder of what was run before")
@click.option(
    "--part", callback=read_part, default="1/1", help="of the work: fill the cache with it, and write nothing"
)
@click.option("--curves", callback=names(CURVES), default=",".join(CURVES), help="machines")
@click.pass_context
def main(context: click.Context, traces: Path, cache: Path, part: tuple[int, int], curves: list[str]) -> None:
    """Score the autoscaler's policy against its rivals, in simulation."""
    context.obj = {"traces": traces, "cache": Cache(cache), "part": part}, curves


def of(scenarios: Sequence[Scenario], curves: Sequence[str]) -> list[Scenario]:
    return [scenario for scenario in scenarios if scenario.curve in curves]


@main.command()
@click.option("--json", type=click.Path(path_type=Path), default=RESULTS / "autoscaler-tuning.json", help="result file")
@click.option("--frozen", type=click.Path(path_type=Path), default=FROZEN, help="the choices, for `score`")
@click.pass_obj
def tune(obj: tuple[dict[str, Any], list[str]], json: Path, frozen: Path) -> None:
    """Choose the best of the same number of configurations for every rival, and freeze it."""
    shared, curves = obj
    contenders = {
        name: [
            Contender(policy, str(number), parameters)
            for policy in SPACES
            for number, parameters in enumerate(configurations(policy, read_curve(CURVES[name])))
        ]
        for name in curves
    }
    scenarios = of(TUNING, curves)
    runs = run_all(scenarios, TUNING_SEEDS, contenders, oracle=False, **shared)
    if shared["part"] != (1, 1):
        return
    found = choices(runs)
    result = Tuning(
        command="python -m bench.autoscaler tune",
        scenarios=[f"{each.curve}: {each.trace}" for each in scenarios],
        seeds=TUNING_SEEDS,
        cold_starts_seconds=COLD_STARTS,
        choices=found,
    )
    write_result(json, result)
    best = {curve: {policy: each[0].parameters for policy, each in rivals.items()} for curve, rivals in found.items()}
    frozen.write_bytes(msgspec.json.format(msgspec.json.encode(best), indent=2) + b"\n")
    for curve, rivals in found.items():
        for policy, each in rivals.items():
            default = next(choice for choice in each if not choice.parameters)
            click.echo(
                f"{curve} {policy}: {each[0].relative_gpu_hours:.2f} of static, {each[0].violations:.2%} violations "
                f"(default {default.relative_gpu_hours:.2f}, {default.violations:.2%}) with {dict(each[0].parameters)}"
            )


@main.command()
@click.option("--quick", is_flag=True, help="two seeds and one cold start")
@click.option("--policies", callback=names(EVERYONE), default=",".join(EVERYONE), help="who takes part")
@click.option("--json", type=click.Path(path_type=Path), default=RESULTS / "autoscaler-score.json", help="result file")
@click.pass_obj
def score(obj: tuple[dict[str, Any], list[str]], quick: bool, policies: list[str], json: Path) -> None:
    """Run every contender on traces that nobody was tuned on."""
    shared, curves = obj
    frozen = msgspec.json.decode(FROZEN.read_bytes(), type=dict[str, dict[str, dict[str, Any]]])
    seeds, cold_starts = (SEEDS[:2], COLD_STARTS[1:2]) if quick else (SEEDS, COLD_STARTS)
    command = ["python -m bench.autoscaler score", *["--quick"] * quick]
    command += [] if policies == EVERYONE else ["--policies", ",".join(policies)]
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    contenders = {curve: field(policies, frozen[curve]) for curve in curves}
    runs = run_all(of(HELD_OUT, curves), seeds, contenders, cold_starts=cold_starts, oracle=True, **shared)
    if shared["part"] != (1, 1):
        return
    result = Score(
        command=" ".join(command),
        started_at=started_at,
        machine=this_machine(),
        curves={name: CURVES[name].name for name in curves},
        seeds=seeds,
        frozen=frozen,
        rows=rows(runs),
    )
    write_result(json, result)
    json.with_suffix(".md").write_text(markdown(result))
    json.with_suffix(".svg").write_text(plot(result))
    click.echo(markdown(result))


def field(policies: Sequence[str], frozen: Mapping[str, Mapping[str, Any]]) -> list[Contender]:
    """Ours as it is, and every rival as it is published and as it was tuned."""
    found = [Contender(OURS, "", {})] if OURS in policies else []
    for policy in policies:
        if policy != OURS:
            found += [Contender(policy, "default", {}), Contender(policy, "tuned", frozen[policy])]
    return found


if __name__ == "__main__":
    sys.exit(main())
