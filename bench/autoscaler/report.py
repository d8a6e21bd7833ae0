"""What `bench.autoscaler` found: the schema of its result files, the tables, and the picture.

Names end in their unit, and `schema` grows when a field changes its meaning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from math import log10
from statistics import fmean
from typing import Any

import msgspec

from autoscaler.simulate.provision import LATE_SHARE
from bench.autoscaler.protocol import cost
from bench.autoscaler.runs import Contender, Run
from bench.measure import Machine
from bench.svg import line, picture, text

SCHEMA = 1


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration of a rival and what it cost, on average over the tuning runs."""

    parameters: Mapping[str, Any]
    cost: float
    relative_gpu_hours: float  # to static
    violations: float
    worst_violations: float


class Tuning(msgspec.Struct, frozen=True, kw_only=True):
    """By curve and rival, the best first."""

    schema: int = SCHEMA
    command: str
    scenarios: Sequence[str]
    seeds: Sequence[int]
    cold_starts_seconds: Sequence[float]
    choices: Mapping[str, Mapping[str, Sequence[Choice]]]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A contender in a scenario with a cold start; lists are by seed."""

    scenario: str
    curve: str
    cold_start_seconds: float
    policy: str
    violations: Sequence[float]
    gpu_hours: Sequence[float]
    unscalable: float  # these are means over seeds
    lost: float
    to_static: float
    to_oracle: float
    wait_p50_seconds: float
    wait_p99_seconds: float
    scale_events: float
    max_ready: float
    fluid_to_static: float  # what the work takes if it could be spread evenly

    @property
    def mean_violations(self) -> float:
        return fmean(self.violations)


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """A result file."""

    schema: int = SCHEMA
    command: str
    started_at: str  # ISO 8601, UTC
    machine: Machine
    curves: Mapping[str, str]  # name -> file
    seeds: Sequence[int]
    frozen: Mapping[str, Mapping[str, Mapping[str, Any]]]  # curve -> rival -> parameters
    rows: Sequence[Row]


def choices(runs: Sequence[Run]) -> dict[str, dict[str, list[Choice]]]:
    """What tuning runs say of each configuration."""
    found: dict[str, dict[str, list[Choice]]] = {}
    contending = [run for run in runs if run.contender.policy not in ("static", "oracle")]
    for (curve, policy, _), group in _grouped(
        contending, lambda run: (run.curve, run.contender.policy, run.contender.variant)
    ):
        relative = [run.gpu_hours / run.static_gpu_hours for run in group]
        found.setdefault(curve, {}).setdefault(policy, []).append(
            Choice(
                parameters=group[0].contender.parameters,
                cost=fmean(cost(each, run.violations) for each, run in zip(relative, group, strict=True)),
                relative_gpu_hours=fmean(relative),
                violations=fmean(run.violations for run in group),
                worst_violations=max(run.violations for run in group),
            )
        )
    for rivals in found.values():
        for each in rivals.values():
            each.sort(key=lambda choice: choice.cost)
    return found


def label(contender: Contender) -> str:
    return f"{contender.policy} {contender.variant}".strip()


def rows(runs: Sequence[Run]) -> list[Row]:
    oracle = {
        (run.curve, run.scenario, run.cold_start_seconds, run.seed): run.gpu_hours
        for run in runs
        if run.contender.policy == "oracle"
    }
    found = []
    for (curve, scenario, cold_start, name), group in _grouped(
        runs, lambda run: (run.curve, run.scenario, run.cold_start_seconds, label(run.contender))
    ):
        found.append(
            Row(
                scenario=scenario,
                curve=curve,
                cold_start_seconds=cold_start,
                policy=name,
                violations=[round(run.violations, 6) for run in group],
                gpu_hours=[round(run.gpu_hours, 4) for run in group],
                unscalable=_mean(run.unscalable for run in group),
                lost=_mean(run.lost for run in group),
                to_static=_mean(run.gpu_hours / run.static_gpu_hours for run in group),
                to_oracle=_mean(run.gpu_hours / oracle[curve, scenario, cold_start, run.seed] for run in group),
                wait_p50_seconds=_mean(run.wait_p50_seconds for run in group),
                wait_p99_seconds=_mean(run.wait_p99_seconds for run in group),
                scale_events=_mean(run.scale_outs + run.scale_ins for run in group),
                max_ready=_mean(run.max_ready for run in group),
                fluid_to_static=_mean(run.fluid_gpu_hours / run.static_gpu_hours for run in group),
            )
        )
    return found


def _grouped(runs: Sequence[Run], key: Any) -> Iterator[tuple[Any, list[Run]]]:
    """In the order in which each group came first."""
    order: dict[Any, int] = {}
    for run in runs:
        order.setdefault(key(run), len(order))
    for group, members in groupby(sorted(runs, key=lambda run: order[key(run)]), key):
        yield group, sorted(members, key=lambda run: run.seed)


def _mean(values: Iterable[float]) -> float:
    return round(fmean(values), 6)


class Total(msgspec.Struct, frozen=True, kw_only=True):
    """A contender over all scenarios and cold starts of a curve."""

    policy: str
    kept: int  # rows whose mean violations are within the promise
    rows: int
    violations: float
    worst_violations: float
    to_static: float
    worst_to_static: float
    to_oracle: float
    worst_to_oracle: float


def totals(score: Score, curve: str) -> list[Total]:
    names = list(dict.fromkeys(row.policy for row in score.rows if row.curve == curve))
    found = []
    for name in names:
        mine = [row for row in score.rows if row.curve == curve and row.policy == name]
        found.append(
            Total(
                policy=name,
                kept=sum(row.mean_violations <= LATE_SHARE for row in mine),
                rows=len(mine),
                violations=fmean(row.mean_violations for row in mine),
                worst_violations=max(row.mean_violations for row in mine),
                to_static=_mean(row.to_static for row in mine),
                worst_to_static=max(row.to_static for row in mine),
                to_oracle=_mean(row.to_oracle for row in mine),
                worst_to_oracle=max(row.to_oracle for row in mine),
            )
        )
    return found


def markdown(score: Score) -> str:
    """Every figure of a score: totals by machine, then a table of each scenario and cold start."""
    parts = [f"`{score.command}`, seeds {', '.join(map(str, score.seeds))}\n"]
    for curve in dict.fromkeys(row.curve for row in score.rows):
        parts.append(f"### {curve}: all scenarios and cold starts ({score.curves[curve]})\n")
        parts.append("| policy | within 1 % | violations | worst | GPU-hours ÷ static | worst | ÷ oracle | worst |")
        parts.append("|---|---|---|---|---|---|---|---|")
        parts += [
            f"| {each.policy} | {each.kept} of {each.rows} | {each.violations:.2%} | {each.worst_violations:.2%} | "
            f"{each.to_static:.2f} | {each.worst_to_static:.2f} | {each.to_oracle:.2f} | {each.worst_to_oracle:.2f} |"
            for each in totals(score, curve)
        ]
        parts.append("")
        for scenario in dict.fromkeys(row.scenario for row in score.rows if row.curve == curve):
            parts += _scenario_table(score, curve, scenario)
    return "\n".join(parts)


def _scenario_table(score: Score, curve: str, scenario: str) -> list[str]:
    mine = [row for row in score.rows if (row.curve, row.scenario) == (curve, scenario)]
    static = next(row for row in mine if row.policy == "static")
    parts = [f"#### {curve}, {scenario}\n"]
    parts.append(
        f"Static has {static.max_ready:.1f} replicas on average over seeds; work alone is {static.fluid_to_static:.2f} "
        "of its GPU-hours.\n"
    )
    parts.append(
        "| policy | cold start | violations, mean (worst seed) | after a jump | ÷ static | ÷ oracle | "
        "queue wait p50, p99 | scale events | lost |"
    )
    parts.append("|---|---|---|---|---|---|---|---|---|")
    for row in mine:
        late = f"{row.mean_violations:.2%} ({max(row.violations):.2%}) | {row.unscalable:.2%}"
        waits = f"{row.wait_p50_seconds:.2f} s, {row.wait_p99_seconds:.1f} s"
        parts.append(
            f"| {row.policy} | {row.cold_start_seconds:.0f} s | {late} | {row.to_static:.2f} | "
            f"{row.to_oracle:.2f} | {waits} | {row.scale_events:.0f} | {row.lost:.2%} |"
        )
    return [*parts, ""]


_PANEL, _HEIGHT, _LEFT, _TOP, _GAP = 300.0, 300.0, 60.0, 50.0, 30.0
_FILLED = {"ours": "#1f5fa8", "static": "#777777", "oracle": "#000000"}
_RIVALS = ("#b8860b", "#2e8b57", "#8b1a1a", "#6a3d9a", "#ff7f00", "#17becf")
_MARKS = (0.0001, 0.001, 0.01, 0.1, 1.0)  # violations
_MOST_COST = 2.0


def plot(score: Score) -> str:
    """SVG, a panel for each cold start: what a contender costs against static, and how many requests it is late for.
    A dot for each scenario; ours and the references are filled; the corner to be in is below the line, to the left."""
    names = [name for name in dict.fromkeys(row.policy for row in score.rows) if not name.endswith("default")]
    starts = sorted({row.cold_start_seconds for row in score.rows})
    rivals = [name for name in names if name not in _FILLED]
    colours = _FILLED | {name: _RIVALS[place % len(_RIVALS)] for place, name in enumerate(rivals)}
    parts: list[str] = []
    for panel, start in enumerate(starts):
        left = _LEFT + panel * (_PANEL + _GAP)
        parts += _axes(left, f"cold start {start:.0f} s", first=panel == 0)
        for row in score.rows:
            if row.cold_start_seconds == start and row.policy in names:
                x = left + min(row.to_static, _MOST_COST) / _MOST_COST * _PANEL
                parts.append(_dot(x, _height(row.mean_violations), row.policy, colours))
    for place, name in enumerate(names):
        x = _LEFT + place * 120
        parts.append(_dot(x, _TOP + _HEIGHT + 52, name, colours))
        parts.append(text(x + 8, _TOP + _HEIGHT + 56, name))
    title = "Of every scenario: violations by GPU-hours ÷ static. Filled: ours, static, oracle. Line: the promised 1 %"
    width = max(_LEFT + len(starts) * (_PANEL + _GAP), _LEFT + len(names) * 120)
    return picture(width, _TOP + _HEIGHT + 70, [text(10, 18, title), *parts])


def _dot(x: float, y: float, name: str, colours: Mapping[str, str]) -> str:
    fill = colours[name] if name in _FILLED else "none"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" stroke="{colours[name]}" fill="{fill}"/>'


def _height(violations: float) -> float:
    """Of a dot: logarithmic, with everything below 0.01 % at the bottom."""
    share = max(violations, _MARKS[0]) / _MARKS[0]
    return _TOP + _HEIGHT * (1 - log10(share) / (len(_MARKS) - 1))


def _axes(left: float, title: str, first: bool) -> Iterator[str]:
    yield text(left, _TOP - 8, title, bold=True)
    for mark in _MARKS:
        y = _height(mark)
        yield line(left, y, left + _PANEL, y)
        if first:
            yield text(left - 4, y + 4, f"{100 * mark:g}%", "end")
    y = _height(LATE_SHARE)
    yield f'<line x1="{left:.1f}" y1="{y:.1f}" x2="{left + _PANEL:.1f}" y2="{y:.1f}" stroke="#8b1a1a"/>'
    for step in range(5):
        x = left + step / 4 * _PANEL
        yield line(x, _TOP, x, _TOP + _HEIGHT)
        yield text(x, _TOP + _HEIGHT + 16, f"{step / 4 * _MOST_COST:g}", "middle")
