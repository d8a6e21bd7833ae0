"""Other projects' clients against a real server: `make clients-test`.

They run in .venv-clients; the server, and what only the project can make, in .venv (NEMOSERVE_PYTHON names its Python).
Nothing is fetched from a hub.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server import ServerProcess

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHON = Path(os.environ.get("NEMOSERVE_PYTHON", ROOT / ".venv" / "bin" / "python"))
MODEL = "smollm2-135m-instruct"

if importlib.util.find_spec("litellm") is None:  # this is .venv, where `make test` runs
    collect_ignore_glob = ["test_*.py"]

# Before the clients are imported: no hub, no telemetry of theirs.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LANGSMITH_TRACING": "false",
}


def from_project(what: str, where: str | Path, given: object = None) -> str:
    """What `tests.clients.material` prints."""
    command = [str(PYTHON), "-m", "tests.clients.material", what, str(where)]
    done = subprocess.run(command, cwd=ROOT, input=json.dumps(given), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """With the embedded model."""
    running = ServerProcess.start(command=PYTHON.parent / "nemoserve")
    yield running
    assert running.stop() == 0, "".join(running.lines)


@pytest.fixture(scope="session")
def nemo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """With a random model that has NeMo's tool calls."""
    folder = tmp_path_factory.mktemp("nemo")
    from_project("nemo", folder)
    running = ServerProcess.start(folder, "--served-model-name", "nemo", command=PYTHON.parent / "nemoserve")
    yield running
    assert running.stop() == 0, "".join(running.lines)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    from_project("tokenizer", folder)
    return folder


def asked(server: ServerProcess, **fields: Any) -> dict[str, Any]:
    """Arguments that every client takes."""
    return {"base_url": f"http://{server.http_address}/v1", "api_key": "none", "max_retries": 0, "timeout": 60} | fields
