"""`python -m autoscaler.simulate`, and what it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from autoscaler.simulate import ARITHMETIC, Slo, read_curve
from autoscaler.simulate.__main__ import main
from autoscaler.simulate.curve import default_curve

TRACE = "steps:rate=6,hours=0.2,every=240"


def ran(*arguments: str, code: int = 0) -> str:
    answer = CliRunner().invoke(main, [TRACE, "--curve", str(ARITHMETIC), *arguments])
    assert answer.exit_code == code, answer.output
    return answer.output


def test_several_policies_make_one_table_that_names_the_curve() -> None:
    lines = ran("--policy", "static:1", "--policy", "hpa", "--initial-replicas", "2").splitlines()
    assert any("h100-arithmetic.json" in line and "not measured" in line for line in lines)
    rows = [line.split() for line in lines[-3:]]
    assert [row[0] for row in rows] == ["policy", "static:1", "hpa"]


def test_json_has_the_figures_and_all_that_they_depend_on() -> None:
    (result,) = json.loads(ran("--policy", "static:2", "--initial-replicas", "2", "--seed", "3", "--json"))
    assert (result["policy"], result["trace"], result["curve"], result["seed"]) == (
        "static:2",
        TRACE,
        "h100-arithmetic.json",
        3,
    )
    assert result["options"]["cold_start_seconds"] == 120
    assert result["slo"] == {"ttft_seconds": 2.0, "itl_seconds": 0.06}
    assert result["gpu_hours"] == pytest.approx(2 * (720 - 300) / 3600, rel=0.01)


def test_a_fleet_starts_as_large_as_static_provisioning_needs_it() -> None:
    (result,) = json.loads(ran("--policy", "static:1", "--json"))
    assert result["options"]["initial_replicas"] >= 1
    assert result["options"]["max_replicas"] == 2 * result["options"]["initial_replicas"]


def test_the_picture_is_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "out.svg"
    ran("--policy", "static:2", "--policy", "static:3", "--initial-replicas", "2", "--plot", str(path))
    words = [each.text for each in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]
    assert f"static:3 on {TRACE}" in words
    assert words.count("queued") == words.count("violations") == 2


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--policy", "nobody"], "policy 'nobody': not one of ours, static:N"),
        (["--policy", "static:99"], "static:N takes N from 1 to max-replicas, 4"),
        (["--policy", "hpa:target"], "'target' is not name=value"),
        (["--crashes-mtbf", "-1"], "mtbf_seconds is -1.0; it must be above 0"),
        (["--min-replicas", "9"], "replicas from 9 to 4: not a range"),
        (["--curve", "/nowhere.json"], "/nowhere.json: No such file"),
    ],
)
def test_a_wrong_option_is_refused_with_its_reason(arguments: list[str], why: str) -> None:
    assert why in ran("--initial-replicas", "2", *arguments, code=2).replace("\n", " ")


def test_a_curve_that_cannot_be_is_refused_by_the_name_of_its_field(tmp_path: Path) -> None:
    good = json.loads(ARITHMETIC.read_text())
    path = tmp_path / "mine.json"
    for change, why in [
        ({"max_batch_size": 4096}, "max_batch_size is 4096"),
        ({"step_cost": {"base": 0}}, r"step_cost\.base is 0"),
        ({"step_cost": {"basis": 1}}, "basis"),
        ({"kv_tokens": 1}, "kv_tokens is 1"),
    ]:
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=why):
            read_curve(path)
    del good["kv_tokens"]
    path.write_text(json.dumps(good))
    with pytest.raises(ValueError, match=r"mine\.json.*kv_tokens"):
        read_curve(path)


def test_a_measured_curve_is_the_default_and_the_promise_suits_it() -> None:
    measured = default_curve()
    assert measured.name.startswith("step-costs-")
    slow = replace(measured, step_cost=replace(measured.step_cost, per_prefill_token=3e-4))
    assert Slo.suited_to(slow).ttft_seconds == pytest.approx(20.0)
    assert Slo.suited_to(read_curve(ARITHMETIC)) == Slo()
