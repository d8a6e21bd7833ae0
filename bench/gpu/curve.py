"""What a step costs on a card: `python -m bench.gpu.curve RESULT --part fp8 --kv-tokens N --out CURVE`.

    result of bench.gpu ──► seconds = base + a · prompt tokens + b · decode rows + c · context tokens ──► --curve of
                                                                                            `autoscaler.simulate`
The four numbers are those of `autoscaler.fleet.StepCost`, fitted by least squares of relative errors to the decodes and
to the prompts that took one step.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import numpy as np

from autoscaler.fleet import StepCost
from bench.gpu.report import Figure, Journal, Report
from bench.gpu.workload import FULL

TERMS = tuple(field.name for field in fields(StepCost))


@dataclass(frozen=True, slots=True)
class Point:
    """A step that was measured: what `StepCost` multiplies, and its seconds."""

    name: str
    prefill_tokens: int
    decode_rows: int
    context_tokens: int
    seconds: float

    @property
    def terms(self) -> tuple[int, int, int, int]:
        return 1, self.prefill_tokens, self.decode_rows, self.context_tokens


def points(report: Report, part: str) -> list[Point]:
    """Of recorded steps, where there are some."""
    figures = [figure for figure in report.figures if figure.part == part]
    mode = "graphs" if any(figure.mode == "graphs" for figure in figures) else "eager"
    found = (_point(figure) for figure in figures if figure.mode == mode)
    return [point for point in found if point is not None]


def _point(figure: Figure) -> Point | None:
    if match := re.fullmatch(r"decode (\d+) x (\S+)", figure.name):
        rows = int(match[1])
        return Point(figure.name, 0, rows, rows * _tokens(match[2]), rows / figure.value)
    match = re.fullmatch(r"prefill (\S+)", figure.name)
    if match is None or (tokens := _tokens(match[1])) > FULL.max_batch_tokens:
        return None
    return Point(figure.name, tokens, 0, tokens, tokens / figure.value)


def _tokens(short: str) -> int:
    return int(short[:-1]) * 1024 if short.endswith("K") else int(short)


def fit(measured: list[Point]) -> StepCost:
    """Raises ValueError where the figures do not say what a step costs."""
    if len(measured) < len(TERMS):
        raise ValueError(f"{len(measured)} steps were measured, and {len(TERMS)} numbers are asked for")
    terms, seconds = np.array([point.terms for point in measured], float), np.array([each.seconds for each in measured])
    found, _, rank, _ = np.linalg.lstsq(terms / seconds[:, None], np.ones(len(measured)), rcond=None)
    if rank < len(TERMS) or found.min() < 0:
        told = ", ".join(f"{name} {value:.2e}" for name, value in zip(TERMS, found, strict=True))
        raise ValueError(f"no cost per token fits the measured steps: {told}")
    return StepCost(*map(float, found))


def predicted(cost: StepCost, point: Point) -> float:
    """Seconds."""
    return float(np.dot(astuple(cost), point.terms))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.curve", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--part", default="fp8")
    parser.add_argument("--kv-tokens", type=int, required=True, help="that the KV cache held: 64 times its pages")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    report = Journal.open(options.result).report
    measured = points(report, options.part)
    cost = fit(measured)
    worst = 0.0
    for point in measured:
        off = predicted(cost, point) / point.seconds - 1
        worst = max(worst, abs(off))
        print(f"{point.name:20} {1000 * point.seconds:8.2f} ms measured, {off:+.0%}")
    curve = {
        "step_cost": asdict(cost),
        "max_batch_size": FULL.batches[-1],
        "max_step_tokens": FULL.max_batch_tokens,
        "kv_tokens": options.kv_tokens,
        "model": f"Mistral NeMo 12B, {options.part}, random weights",
        "machine": f"{report.card.name}, fitted to {options.result.name} within {worst:.0%}",
    }
    options.out.write_text(json.dumps(curve, indent=2) + "\n")


if __name__ == "__main__":
    main()
