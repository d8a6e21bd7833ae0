"""bench.step_costs: its arithmetic, that it sees every step of an engine, and what it writes, on a tiny model."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from bench import step_costs as program
from bench.step_costs import Arrival, Driver, Errors, Step, check, checked_mix, learned_mixes
from engine.config import EngineConfig
from engine.costs import StepCost
from engine.parallel.leader import load_runner
from engine.step import RowWork, StepPlan
from tests.tiny_models import write_hf

COST = StepCost(0.01, 0.001, 0.002, 0.0001)


def work(row: int, start: int, tokens: int, *, sample: bool) -> RowWork:
    return RowWork(row=row, start=start, token_ids=[1] * tokens, new_pages=[], sample=sample)


def test_a_step_is_counted_as_the_engine_counts_it() -> None:
    plan = StepPlan([work(0, 40, 1, sample=True), work(1, 0, 20, sample=False), work(2, 64, 10, sample=True)])

    step = Step.of(plan, 0.5)

    assert (step.prefill_tokens, step.decode_rows, step.context_tokens) == (30, 1, 41 + 20 + 74)
    assert step.foretold(COST) == pytest.approx(0.01 + 30 * 0.001 + 0.002 + 135 * 0.0001)


def test_kinds_of_steps_tell_apart_what_they_compute() -> None:
    sizes = {(9, 0): "prefill", (9, 2): "prefill + decode", (0, 1): "decode 1", (0, 3): "decode 2-4"}
    sizes |= {(0, 16): "decode 5-16", (0, 17): "decode 17+"}
    assert {(p, d): Step(1.0, p, d, 99).kind for p, d in sizes} == sizes


def test_errors_are_those_of_the_median_of_the_rounds() -> None:
    steps = [Step(0.0, 0, 1, 50), Step(0.0, 100, 0, 100)]
    seconds = [step.foretold(COST) for step in steps]

    def run(*factors: float) -> list[Step]:
        return [taking(step, s * f) for step, s, f in zip(steps, seconds, factors, strict=True)]

    found = check(COST, [run(1.0, 0.8), run(1.0, 7.0), run(3.0, 0.8)])

    assert found.kinds["decode 1"] == Errors(
        steps=1, median_relative=pytest.approx(0), p90_relative=pytest.approx(0), seconds_ratio=pytest.approx(1)
    )
    assert found.kinds["prefill"].median_relative == pytest.approx(0.25)  # foretold / measured is 1 / 0.8
    assert found.steps == 2
    assert found.seconds_ratio == pytest.approx(sum(seconds) / (seconds[0] + 0.8 * seconds[1]))


def taking(step: Step, seconds: float) -> Step:
    return Step(seconds, step.prefill_tokens, step.decode_rows, step.context_tokens)


def test_rounds_that_took_other_steps_are_not_compared() -> None:
    with pytest.raises(ValueError, match="same steps"):
        check(COST, [[Step(1.0, 0, 1, 50)], [Step(1.0, 0, 1, 51)]])


def test_mixes_fit_any_engine() -> None:
    for max_rows, longest in ((1, 64), (32, 8000), (300, 128)):
        mixes = learned_mixes(max_rows, longest)
        assert max(len(mix) for mix in mixes if {each.step for each in mix} == {0}) == max_rows
        assert all(1 <= each.prompt_tokens <= longest for mix in mixes for each in mix)
        assert all(1 <= each.prompt_tokens <= longest for each in checked_mix(50, longest))
    assert checked_mix(50, 99) == checked_mix(50, 99)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_every_step_is_seen_once(lookahead: int, tmp_path: Path) -> None:
    config = EngineConfig(
        model_path=str(write_hf(tmp_path / "model")),
        device="cpu",
        threads=1,
        max_model_len=256,
        max_batch_tokens=32,
        max_draft_tokens=0,
        lookahead=lookahead,
    )
    driver = Driver(load_runner(config, lambda phase, done: None), config, time.perf_counter)

    began = time.perf_counter()
    steps = driver.run([Arrival(0, 50, 5), Arrival(0, 20, 3), Arrival(90, 10, 2)], seed=1)  # the last after a pause
    took = time.perf_counter() - began

    stats = driver.core.stats()
    assert sum(step.prefill_tokens for step in steps) == stats.prompt_tokens == 80
    assert sum(step.decode_rows for step in steps) == stats.generated_tokens - 3 == 4 + 2 + 1
    assert sum(step.prefill_tokens + step.decode_rows > 0 for step in steps) == sum(stats.step_times.counts)
    assert 0 < sum(step.seconds for step in steps) <= took


def test_the_program_writes_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "CHECKED_REQUESTS", 6)
    model, path = write_hf(tmp_path / "tiny"), tmp_path / "costs.json"
    arguments = [
        "--model",
        str(model),
        "--rounds",
        "1",
        "--max-batch-size",
        "4",
        "--device",
        "cpu",
        "--json",
        str(path),
    ]

    done = CliRunner().invoke(program.main, arguments, catch_exceptions=False)

    assert done.exit_code == 0
    result = msgspec.json.decode(path.read_bytes(), type=program.Result)
    assert (result.model, result.max_batch_size, result.max_step_tokens, result.clock) == ("tiny", 4, 512, "cpu")
    assert result.kv_tokens > 0
    assert max(msgspec.structs.astuple(result.step_cost)) > 0
    assert sum(each.steps for each in result.error.kinds.values()) == result.error.steps > 0
    assert str(tmp_path) not in path.read_text()
    assert f"{result.error.median_relative:.1%}" in done.output
