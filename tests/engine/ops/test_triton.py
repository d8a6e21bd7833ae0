"""The tests of triton/ in a process of their own: Triton settles at its import whether kernels are interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_are_right_under_tritons_interpreter() -> None:
    """All files in one process, which imports torch and Triton once."""
    command = [sys.executable, "-m", "pytest", str(HERE / "triton"), "--rootdir", str(HERE.parents[2])]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("options", [["--quick"], pytest.param([], marks=pytest.mark.slow)], ids=["quick", "all"])
def test_the_kernels_compile_for_cards_that_are_not_there(options: list[str]) -> None:
    """All of them take four minutes of a quiet core."""
    command = [sys.executable, "-m", "engine.ops.triton.check", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_operators_are_imported_without_triton() -> None:
    code = "import engine.ops, sys; sys.exit(any(name.split('.')[0] == 'triton' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
