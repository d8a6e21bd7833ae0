"""The protobuf contract: lint-clean, never broken, and the committed stubs are what the compiler writes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from proto.generate import PROTO, generate

BUF = Path(sys.executable).parent / "buf"


def buf(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BUF, *map(str, args)], capture_output=True, text=True, timeout=60, check=False)


def test_committed_stubs_are_current(tmp_path: Path) -> None:
    generate(tmp_path)
    fresh = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*_pb2*"))
    assert fresh
    for name in fresh:
        assert (PROTO / name).read_text() == (tmp_path / name).read_text(), f"{name} is stale: run `make proto`"


def test_contract_is_lint_clean() -> None:
    result = buf("lint", PROTO)
    assert result.returncode == 0, result.stdout


def test_contract_does_not_break_the_released_one() -> None:
    result = buf("breaking", PROTO, "--against", PROTO / "baseline.json")
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("old", "new"),
    [("string request_id = 1;", "string request_id = 99;"), ("rpc GetLoad(", "rpc GetLoads(")],
    ids=["field renumbered", "rpc renamed"],
)
def test_a_breaking_change_is_caught(tmp_path: Path, old: str, new: str) -> None:
    shutil.copytree(PROTO, tmp_path / "proto", ignore=shutil.ignore_patterns("*.py*", "baseline.json"))
    source = tmp_path / "proto/nemoserve/v1/generation.proto"
    text = source.read_text()
    assert old in text
    source.write_text(text.replace(old, new, 1))
    assert buf("breaking", tmp_path / "proto", "--against", PROTO / "baseline.json").returncode != 0


def test_tritonclient_was_not_dragged_back_by_another_pin() -> None:
    major, minor = map(int, version("tritonclient").split(".")[:2])
    assert (major, minor) >= (2, 70)
