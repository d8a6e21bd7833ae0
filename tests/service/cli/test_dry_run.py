"""`serve --dry-run` as a person or a script meets it: settings with their sources, and what would fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from engine.probe import Found
from service.cli.main import main
from service.settings.definitions import SETTINGS
from tests.service.cli.test_doctor import MACHINE


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """8 GiB free, and a store with nothing in it."""
    monkeypatch.setenv("NEMOSERVE_CACHE", str(tmp_path))
    monkeypatch.setattr("service.cli.doctor.look", lambda *_: Found(machine=MACHINE, weights=None))


def dry_run(*arguments: str, **environ: str) -> Result:
    return CliRunner().invoke(main, ["serve", *arguments, "--dry-run"], env=environ)


def answer(*arguments: str, **environ: str) -> Any:
    return json.loads(dry_run(*arguments, "--json", **environ).stdout)


def test_it_prints_every_value_and_its_source(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("max_batch_size: 4")
    found = answer("--config", str(config), NEMOSERVE_THREADS="3", NIM_MAX_MODEL_LEN="1024")["settings"]
    assert set(found) == {setting.name for setting in SETTINGS}
    assert found["threads"] == {"value": 3, "source": "NEMOSERVE_THREADS"}
    assert found["max_model_len"] == {"value": 1024, "source": "NIM_MAX_MODEL_LEN"}
    assert found["max_batch_size"] == {"value": 4, "source": f"file {config}: max_batch_size"}
    assert found["model"] == {"value": "smollm2-135m-instruct", "source": "default"}


def test_it_tells_what_would_be_taken_why_and_how_much_fits() -> None:
    result = dry_run()
    assert result.exit_code == 0
    last = result.stdout.splitlines()[-1]
    assert last == (
        "chosen here: smollm2-135m-instruct/cpu-int4-tp1, because its file is kept as it is unless --precision says "
        "otherwise; 65,536 tokens of KV cache, requests of up to 8,192"
    )
    found = answer()
    assert (found["profile"], found["failure"]) == ("smollm2-135m-instruct/cpu-int4-tp1", None)
    [taken] = [each for each in found["profiles"] if each["taken"]]
    assert (taken["group"], taken["tokens_by_default"]) == ("runs here", 65536)


def test_what_is_asked_for_is_chosen_and_says_who_asked() -> None:
    result = dry_run("--kv-memory", "50%", NEMOSERVE_PRECISION="int8")
    assert "chosen here: smollm2-135m-instruct/cpu-int8-tp1, because NEMOSERVE_PRECISION asks for it" in result.stdout
    profile = "smollm2-135m-instruct/cpu-fp8-weight-only-tp1"
    assert f"because profile {profile} asks for it" in dry_run("--profile", profile).stdout


def test_what_serve_would_refuse_ends_with_1_and_says_why() -> None:
    result = dry_run("mistral-nemo-12b")
    assert result.exit_code == 1
    assert result.stderr.startswith("nemoserve: mistral-nemo-12b does not fit: ")
    assert "GiB short" in result.stderr
    assert "does not fit\n->  mistral-nemo-12b-instruct/cpu-bf16-tp1" in result.stdout


def test_a_context_that_has_no_room_says_which_has() -> None:
    result = dry_run("mistral-nemo-12b", "--max-model-len", "131072", "--precision", "int4")
    assert result.exit_code == 1


def test_a_model_that_is_not_there_ends_with_1_after_the_settings() -> None:
    result = dry_run("somewhere")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "no such file and no known model" in result.stderr
    assert "model" in result.stdout
    assert answer("somewhere")["profiles"] == []


def test_it_warns_of_misspelt_variables_beside_its_output() -> None:
    result = dry_run("--json", NIM_GRPC_PORT="1")
    assert "unknown variable NIM_GRPC_PORT; did you mean NIM_GRPC_API_PORT?" in result.stderr
    assert json.loads(result.stdout)["settings"]["grpc_port"] == {"value": 8001, "source": "default"}


def machine_with(monkeypatch: pytest.MonkeyPatch, gib: int) -> None:
    machine = msgspec.structs.replace(MACHINE, free_bytes=gib * 2**30)
    monkeypatch.setattr("service.cli.doctor.look", lambda *_: Found(machine=machine, weights=None))


@pytest.mark.parametrize(
    ("gib", "precision", "group"),
    [
        (64, "bf16", "runs here"),
        (56, "fp8-weight-only", "runs here"),
        (38, "bf16", "tight"),
        (13, "int8", "tight"),
    ],
)
def test_the_profile_auto_is_the_first_that_fits(
    gib: int, precision: str, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_with(monkeypatch, gib)
    found = answer("mistral-nemo-12b", NIM_MODEL_PROFILE="auto")
    assert (found["profile"], found["failure"]) == (f"mistral-nemo-12b-instruct/cpu-{precision}-tp1", None)
    assert found["settings"]["profile"] == {"value": found["profile"], "source": "NIM_MODEL_PROFILE"}
    assert found["settings"]["precision"]["source"] == f"profile {found['profile']}"
    assert [each["group"] for each in found["profiles"] if each["taken"]] == [group]


def test_where_none_fits_each_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_with(monkeypatch, 4)
    result = dry_run("mistral-nemo-12b", "--profile", "auto")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no profile of mistral-nemo-12b fits here: mistral-nemo-12b-instruct/cpu-bf16-tp1: " in result.stderr
    assert result.stderr.count(" GiB short") == 4


def test_what_does_not_fit_is_not_fetched_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.cli.main.fetch", None)
    machine_with(monkeypatch, 4)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    result = CliRunner().invoke(main, ["serve", "mistral-nemo-12b"])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "GiB short" in result.stderr
    assert result.stderr.endswith("; nothing was fetched\n")
