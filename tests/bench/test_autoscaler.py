"""bench.autoscaler: the protocol keeps its rules, runs are done once, and results say what was found."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from statistics import fmean

import msgspec
import pytest
from click.testing import CliRunner

from autoscaler.simulate import Setup, Slo, WorldOptions, load_trace, read_curve
from autoscaler.simulate.provision import LATE_SHARE
from bench.autoscaler import __main__ as program
from bench.autoscaler import runs as running
from bench.autoscaler.protocol import COLD_STARTS, CONFIGURATIONS, CURVES, HELD_OUT, SEEDS, TUNING, Scenario, cost
from bench.autoscaler.report import Score, choices, markdown, plot, rows, totals
from bench.autoscaler.runs import Cache, Contender, Run, Work, make, without_words
from bench.autoscaler.spaces import SPACES, configurations
from bench.measure import Machine

TINY = Scenario("tiny", "steps:rate=0.5,factor=3,every=300,hours=0.25,input=300,output=50", "cpu")
KPA = Contender("kpa", "default", {})


def test_nothing_is_scored_that_was_tuned_on() -> None:
    assert not {each.trace for each in TUNING} & {each.trace for each in HELD_OUT}
    assert len(SEEDS) >= 5
    assert {each.curve for each in TUNING} == {each.curve for each in HELD_OUT} == set(CURVES)


@pytest.mark.parametrize("curve", CURVES)
def test_every_rival_has_the_same_number_of_configurations_with_its_defaults_among_them(curve: str) -> None:
    figures = read_curve(CURVES[curve])
    trace = load_trace(TINY.trace)
    setup = Setup(trace, figures, Slo(), WorldOptions(max_replicas=4))
    for policy in SPACES:
        found = configurations(policy, figures)
        assert len(found) == len({repr(each) for each in found}) == CONFIGURATIONS
        assert found[0] == {}
        assert found == configurations(policy, figures)
        assert found != configurations(policy, figures, seed=1)
        for parameters in found:
            make(Contender(policy, "", parameters), setup)  # none is refused


def test_targets_that_count_requests_are_tried_all_over_the_batch() -> None:
    curve = read_curve(CURVES["h100"])
    targets = sorted(each["target"] for each in configurations("hpa", curve)[1:])
    ratios = [later / earlier for earlier, later in pairwise(targets)]
    assert targets[0] < 0.03 * curve.max_batch_size
    assert targets[-1] > 0.5 * curve.max_batch_size
    assert max(ratios) < 2


def test_cost_is_gpu_hours_and_a_quarter_of_static_for_a_percentage_point_too_many() -> None:
    assert cost(0.8, 0.0) == cost(0.8, LATE_SHARE) == 0.8
    assert cost(0.8, LATE_SHARE + 0.01) == pytest.approx(1.05)


def test_the_promise_on_a_cpu_follows_from_its_curve_and_the_longest_prompts() -> None:
    curve = read_curve(CURVES["cpu"])
    slo = TINY.slo(load_trace("poisson:input=1000,spread=0,hours=0.25"), curve)
    assert slo.itl_seconds == 0.2
    alone = curve.step_cost.base + 1000 * curve.step_cost.per_prefill_token
    assert 2 * alone <= slo.ttft_seconds < 2 * alone + 0.5
    assert HELD_OUT[0].slo(load_trace("poisson:hours=0.25"), curve) == Slo(5.0, 0.06)


def test_a_run_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    first = Work(TINY, 1, cache, tmp_path).run([KPA], [30.0, 120.0], oracle=True)
    assert [(run.contender.policy, run.cold_start_seconds) for run in first] == [
        (policy, start) for policy in ("static", "oracle", "kpa") for start in (30.0, 120.0)
    ]
    assert all(run.gpu_hours <= run.static_gpu_hours and run.violations <= LATE_SHARE for run in first[:4])

    def never(*_: object) -> None:
        raise AssertionError("it was run again")

    monkeypatch.setattr(running, "load_trace", never)
    assert Work(TINY, 1, cache, tmp_path).run([KPA], [30.0, 120.0], oracle=True) == first
    with pytest.raises(AssertionError, match="again"):  # another seed was not
        Work(TINY, 2, cache, tmp_path).run([KPA], [30.0], oracle=False)


def test_words_in_a_source_do_not_make_its_runs_others() -> None:
    source = 'def double(x):\n    """Twice."""\n    return 2 * x  # yes\n'
    assert without_words(source) == without_words("def double(x):\n    return 2 * x\n")
    assert without_words(source) != without_words(source.replace("2 * x", "3 * x"))


def run(policy: str, variant: str, seed: int, violations: float, gpu_hours: float, start: float = 30.0) -> Run:
    return Run(
        scenario="tiny",
        curve="cpu",
        cold_start_seconds=start,
        seed=seed,
        contender=Contender(policy, variant, {"target": variant}),
        requests=100,
        violations=violations,
        lost=0.0,
        unscalable=0.0,
        gpu_hours=gpu_hours,
        static_gpu_hours=4.0,
        fluid_gpu_hours=1.0,
        wait_p50_seconds=0.1,
        wait_p99_seconds=2.0,
        scale_outs=3,
        scale_ins=2,
        max_ready=5,
    )


RUNS = [
    *(run("static", "", seed, 0.005, 4.0, start) for start in (30.0, 120.0) for seed in (1, 2)),
    *(run("oracle", "", seed, 0.009, 2.0, start) for start in (30.0, 120.0) for seed in (1, 2)),
    *(run("kpa", "tuned", 1, 0.03, 3.0, start) for start in (30.0, 120.0)),
    *(run("kpa", "tuned", 2, 0.01, 2.0, start) for start in (30.0, 120.0)),
]


def scored() -> Score:
    return Score(
        command="c",
        started_at="2026-01-01T00:00:00+00:00",
        machine=Machine(cpu="c", cores=1, python="3", system="s", load_average=0.0),
        curves={"cpu": "file.json"},
        seeds=[1, 2],
        frozen={"cpu": {"kpa": {"target": "tuned"}}},
        rows=rows(RUNS),
    )


def test_rows_are_means_over_seeds_of_what_is_relative_to_the_references_of_the_same_seed() -> None:
    row = next(row for row in scored().rows if row.policy == "kpa tuned")
    assert row.violations == [0.03, 0.01]
    assert row.to_static == pytest.approx(fmean([3 / 4, 2 / 4]))
    assert row.to_oracle == pytest.approx(fmean([3 / 2, 2 / 2]))


def test_totals_count_the_rows_that_kept_the_promise() -> None:
    found = {each.policy: each for each in totals(scored(), "cpu")}
    assert (found["static"].kept, found["kpa tuned"].kept, found["kpa tuned"].rows) == (2, 0, 2)
    assert found["kpa tuned"].worst_violations == pytest.approx(0.02)
    assert found["oracle"].to_static == pytest.approx(0.5)


def test_the_table_and_the_picture_name_everyone() -> None:
    table, svg = markdown(scored()), plot(scored())
    for name in ("static", "oracle", "kpa tuned"):
        assert f"| {name} |" in table
        assert f">{name}<" in svg
    assert "2.00% (3.00%)" in table


def test_the_cheapest_choice_comes_first() -> None:
    tried = [
        *(run("kpa", "0", 1, 0.20, 1.0, start) for start in (30.0, 120.0)),
        *(run("kpa", "1", 1, 0.01, 3.0, start) for start in (30.0, 120.0)),
    ]
    first, second = choices([*RUNS[:2], *tried])["cpu"]["kpa"]
    assert (first.parameters, second.parameters) == ({"target": "1"}, {"target": "0"})
    assert (first.cost, second.cost) == (pytest.approx(0.75), pytest.approx(0.25 + 25 * 0.19))


def test_tune_freezes_what_score_then_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "TUNING", [TINY])
    monkeypatch.setattr(program, "HELD_OUT", [TINY])
    monkeypatch.setattr(program, "FROZEN", tmp_path / "frozen.json")
    monkeypatch.setattr(program, "SPACES", {"kpa": SPACES["kpa"]})
    monkeypatch.setattr(program, "configurations", lambda policy, curve: configurations(policy, curve, count=2))
    shared = ["--cache", str(tmp_path / "cache"), "--curves", "cpu"]
    files = ["--json", str(tmp_path / "tuning.json"), "--frozen", str(tmp_path / "frozen.json")]
    tuned = CliRunner().invoke(program.main, [*shared, "tune", *files], catch_exceptions=False)
    assert tuned.exit_code == 0
    assert set(msgspec.json.decode((tmp_path / "frozen.json").read_bytes())["cpu"]) == {"kpa"}
    tried = msgspec.json.decode((tmp_path / "tuning.json").read_bytes())["choices"]["cpu"]["kpa"]
    assert len(tried) == 2
    command = ["score", "--quick", "--policies", "kpa", "--json", str(tmp_path / "score.json")]
    done = CliRunner().invoke(program.main, [*shared, *command], catch_exceptions=False)
    assert done.exit_code == 0
    result = msgspec.json.decode((tmp_path / "score.json").read_bytes(), type=Score)
    assert {row.policy for row in result.rows} == {"static", "oracle", "kpa default", "kpa tuned"}
    assert {row.cold_start_seconds for row in result.rows} == {COLD_STARTS[1]}
    assert (tmp_path / "score.svg").read_text().startswith("<svg")


def test_a_part_of_the_work_fills_the_cache_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "HELD_OUT", [TINY])
    monkeypatch.setattr(program, "FROZEN", tmp_path / "frozen.json")
    (tmp_path / "frozen.json").write_text('{"cpu": {"kpa": {}}}')
    shared = ["--cache", str(tmp_path / "cache"), "--curves", "cpu", "--part", "2/2"]
    command = ["score", "--quick", "--policies", "kpa", "--json", str(tmp_path / "score.json")]
    assert CliRunner().invoke(program.main, [*shared, *command], catch_exceptions=False).exit_code == 0
    assert not (tmp_path / "score.json").exists()
    assert list((tmp_path / "cache").iterdir())
    assert CliRunner().invoke(program.main, ["--part", "3/2", "score"]).exit_code == 2
