"""`pull`, `store` and the reports about models, as a person or a script meets them under our names and NIM's."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from service.cli.main import NIM_NAMES, main
from service.models.download import Progress
from service.models.store import ModelStore, Wanted
from tests.server import NEMOSERVE
from tests.tiny_models import write_hf


def run(*arguments: str, **environ: str) -> Result:
    return CliRunner().invoke(main, arguments, env=environ)


def test_a_model_is_written_to_a_folder_and_served_from_there_without_a_network(tmp_path: Path) -> None:
    """By real processes, one of them under NIM's name."""
    model, out = write_hf(tmp_path / "tiny"), tmp_path / "out"
    environ = os.environ | {"NEMOSERVE_CACHE": str(tmp_path / "store"), "HF_HUB_OFFLINE": "1"}
    command = [NEMOSERVE, "create-model-store", "--model-repo", model, "--model-store", out, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environ)
    assert done.returncode == 0, done.stderr
    total = sum(path.stat().st_size for path in model.iterdir())
    assert json.loads(done.stdout) == {"name": "tiny", "path": str(out), "bytes": total}
    assert "write " in done.stderr
    again = subprocess.run(
        [NEMOSERVE, "pull", out, "--json"], capture_output=True, text=True, timeout=120, check=False, env=environ
    )
    assert json.loads(again.stdout) == {"name": "tiny", "path": str(out)}


def test_sigterm_ends_a_pull_and_gives_the_lock_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(store: ModelStore, wanted: Wanted, source: object, progress: Progress) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)  # other tests in this process set it
    monkeypatch.setattr(ModelStore, "_fetch", fetch)
    before = signal.getsignal(signal.SIGTERM)
    assert run("pull", "smollm2-135m-instruct", NEMOSERVE_CACHE=str(tmp_path)).exit_code == 143
    [lock] = (tmp_path / "locks").iterdir()
    assert lock.read_text().startswith("free")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("variable", ["NIM_DISABLE_MODEL_DOWNLOAD", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize("arguments", [("pull",), ("serve",), ("store", "--to", "out"), ("chat", "--once", "hello")])
def test_where_nothing_may_be_fetched_one_line_says_how_to_bring_it(
    arguments: tuple[str, ...], variable: str, tmp_path: Path
) -> None:
    result = run(*arguments, NEMOSERVE_CACHE=str(tmp_path), **{variable: "true"})
    assert (result.exit_code, result.stdout) == (1, "")
    line = f"{variable} says not to fetch anything; bring it from where it may: nemoserve store smollm2-135m-instruct"
    assert line in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_model_of_a_profile_is_meant_as_nim_means_it(tmp_path: Path) -> None:
    offline = {"NEMOSERVE_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    profile = "mistral-nemo-12b-instruct/h100-fp8-tp1"
    for arguments, environ in (
        (("download-to-cache", "-p", profile), {}),
        (("download-to-cache", "--model-uri", "mistral-nemo-12b-instruct"), {}),
        (("download-to-cache",), {"NIM_MODEL_PROFILE": profile}),
        (("download-to-cache",), {"NIM_MODEL_PATH": "mistral-nemo-12b-instruct", "NEMOSERVE_HOST": "0.0.0.0"}),
    ):
        result = run(*arguments, **offline, **environ)
        assert result.stderr.startswith("nemoserve: mistral-nemo-12b-instruct: not in the store"), arguments


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("pull", "a", "-p", "m/cpu-int8-tp1"), 2, "name a model each: give one of them"),
        (("pull", "-p", "tensorrt_llm-h100-fp8-tp1"), 2, "--profile: 'tensorrt_llm-h100-fp8-tp1' must be MODEL/DEVICE"),
        (("store", "a"), 2, "Missing option '--to'"),
        (("list-model-profile",), 2, "No such command"),
    ],
)
def test_a_wrong_question_is_wrong_usage(arguments: tuple[str, ...], code: int, message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == code
    assert message in result.stderr


@pytest.mark.parametrize(("nim", "ours"), NIM_NAMES.items())
def test_commands_answer_to_the_names_of_nim(nim: str, ours: str) -> None:
    assert run(nim, "--help").stdout.partition("\n")[2] == run(ours, "--help").stdout.partition("\n")[2]
    assert nim not in run("--help").stdout


def on_a_terminal(*arguments: str, **environ: str) -> str:
    """What a person would see, escape sequences and all."""
    ours, theirs = pty.openpty()
    plain = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [NEMOSERVE, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        env=plain | {"TERM": "xterm-256color", "COLUMNS": "80"} | environ,
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # of Linux, when the other end is closed
        pass
    os.close(ours)
    assert process.wait(60) == 0
    return shown.decode().replace("\r\n", "\n")


def test_reports_have_colours_on_a_terminal_and_no_color_is_honoured() -> None:
    arguments = ("profiles", "mistral-nemo-12b", "--gpu", "a100-40gb")
    plain = run(*arguments).stdout
    coloured = on_a_terminal(*arguments)
    assert "\x1b[32mfits\x1b[0m" in coloured
    assert on_a_terminal(*arguments, NO_COLOR="1").replace("\x1b[1m", "").replace("\x1b[0m", "") == plain
    assert "\x1b" not in plain
    assert max(map(len, plain.splitlines())) > 80  # and no line was broken
