"""Costs of a step from the figures of bench.gpu."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from autoscaler.fleet import StepCost
from autoscaler.simulate import read_curve
from bench.gpu import curve
from bench.gpu.curve import Point, fit, points, predicted
from bench.gpu.report import Journal

RESULT = Path(__file__).resolve().parents[2] / "bench" / "results" / "gpu-nemo-12b-h100.json"


def some_points(cost: StepCost, noise: float, seed: int) -> list[Point]:
    rng = random.Random(seed)
    shapes = [(0, rows, rows * context) for rows in (1, 8, 64, 256) for context in (1024, 8192)]
    shapes += [(tokens, 0, tokens) for tokens in (1024, 8192)]
    bare = [Point(str(shape), *shape, seconds=1.0) for shape in shapes]
    return [
        Point(each.name, *each.terms[1:], seconds=predicted(cost, each) * (1 + rng.uniform(-noise, noise)))
        for each in bare
    ]


@pytest.mark.parametrize("seed", range(5))
def test_costs_are_found_again(seed: int) -> None:
    rng = random.Random(seed)
    cost = StepCost(*(scale * rng.uniform(0.5, 2) for scale in (6e-3, 3e-5, 2e-5, 5e-8)))
    for noise, off in ((0.0, 1e-6), (0.02, 0.2)):
        found = fit(some_points(cost, noise, seed))
        for name in curve.TERMS:
            assert getattr(found, name) == pytest.approx(getattr(cost, name), rel=off)


def test_figures_that_say_nothing_are_refused() -> None:
    cost = StepCost(6e-3, 3e-5, 2e-5, 5e-8)
    with pytest.raises(ValueError, match="3 steps were measured"):
        fit(some_points(cost, 0.0, 0)[:3])
    with pytest.raises(ValueError, match="no cost per token fits"):
        fit(some_points(cost, 0.0, 0)[:-2])  # no prompts
    with pytest.raises(ValueError, match="per_decode_row -"):
        fit(some_points(StepCost(6e-3, 3e-5, -1e-5, 5e-8), 0.0, 0))


def test_a_result_becomes_a_curve_that_the_simulator_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = points(Journal.open(RESULT).report, "fp8")
    assert len(measured) == 10
    assert {point.prefill_tokens for point in measured} == {0, 1024, 8192}  # a prompt of 128K took several steps
    out = tmp_path / "curve.json"
    arguments = ["curve", str(RESULT), "--kv-tokens", "761792", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    curve.main()
    assert out.read_text() == (RESULT.parent / "curve-nemo-12b-fp8-h100.json").read_text()
    read = read_curve(out)
    assert (read.max_batch_size, read.kv_tokens) == (256, 761792)
    assert "NVIDIA H100" in read.machine
