"""A process that is told to stop before the command line has been read."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys, types
sys.argv = ["nemoserve", *sys.argv[2:]]
number = int(sys.argv.pop(1))
os.getpid = lambda: number
slow = types.ModuleType("service.cli.main")  # stands for what takes long to import
slow.main = lambda: (print("here", flush=True), signal.pause())
sys.modules["service.cli.main"] = slow
from service.cli.entry import main
main()
"""


@pytest.mark.parametrize(
    ("number", "command", "code"),
    [(1, "serve", 0), (1, "nim-serve", 0), (1, "pull", 143), (2, "serve", -signal.SIGTERM)],
)
def test_process_1_ends_by_sigterm_while_it_starts(number: int, command: str, code: int) -> None:
    arguments = [sys.executable, "-c", PROGRAM, "--", str(number), command]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.terminate()
        assert process.wait(30) == code
