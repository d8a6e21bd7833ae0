"""The kernels of triton/: right, by tests that run beside all others (see conftest), and compiled for any card."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.engine.ops.conftest import Beside


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_are_right_under_tritons_interpreter(interpreted: Beside) -> None:
    """All files of triton/."""
    code, said = interpreted.result()
    assert code == 0, said


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
