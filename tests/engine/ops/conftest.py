"""The tests of triton/ run beside all others: their interpreter computes on one core for minutes, and most other tests
wait for servers. They are a process of their own, since Triton settles at its import whether kernels are interpreted.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import pytest

HERE = Path(__file__).resolve().parent
NICENESS = 10  # so that tests which others wait for go first


@dataclass(frozen=True)
class Beside:
    """A run of pytest, and what it prints."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]

    def result(self) -> tuple[int, str]:
        """Its exit code and its last words, when it has ended."""
        code = self.process.wait(timeout=1200)
        self.output.seek(0)
        return code, self.output.read()[-10_000:].decode(errors="replace")


RUN = pytest.StashKey[Beside]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begins before the first test, if its result is asked for at all."""
    wanted = any("interpreted" in getattr(item, "fixturenames", ()) for item in session.items)
    if not wanted or session.config.option.collectonly or find_spec("triton") is None:
        return
    command = [sys.executable, "-m", "pytest", str(HERE / "triton"), "--rootdir", str(HERE.parents[2])]
    output = tempfile.TemporaryFile()  # noqa: SIM115  # closed when the session ends
    process = subprocess.Popen(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, stdout=output, stderr=subprocess.STDOUT
    )
    os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
    session.config.stash[RUN] = Beside(process, output)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Nothing outlives the session, however it ends."""
    run = config.stash.get(RUN, None)
    if run is not None:
        run.process.kill()
        run.process.wait()
        run.output.close()


@pytest.fixture
def interpreted(request: pytest.FixtureRequest) -> Beside:
    return request.config.stash[RUN]
