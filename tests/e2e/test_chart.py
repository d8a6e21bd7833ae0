"""What the chart gives a server and the pod of `helm test`, given to a real server."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from helm.tools import runs_here
from tests.e2e.conftest import ServerProcess
from tests.helm.conftest import one, rendered, server
from tests.server import NEMOSERVE

pytestmark = pytest.mark.skipif(not runs_here(), reason="helm is fetched for Linux on x86-64 alone")


def test_a_server_of_the_chart_is_probed_and_tested(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = rendered("cpu")
    (tmp_path / "nemoserve.yaml").write_text(one(found, "ConfigMap")["data"]["nemoserve.yaml"])
    for name, value in {"HOST": "127.0.0.1", "LOG_JSON": "false", "LAME_DUCK": "0", "MAX_MODEL_LEN": "512"}.items():
        monkeypatch.setenv(f"NEMOSERVE_{name}", value)
    running = ServerProcess.start(smollm2_path, "--config", tmp_path / "nemoserve.yaml")
    try:
        with running.channel() as channel:
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                asked = health_pb2.HealthCheckRequest(service=server(found)[probe]["grpc"]["service"])
                answer = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=10)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
        [container] = one(found, "Pod")["spec"]["containers"]
        [address] = [each for each in container["args"] if each.startswith("--address=")]
        assert address == "--address=nemo-nemoserve:8001"
        arguments = [each.replace("nemo-nemoserve:8001", running.address) for each in container["args"]]
        home = {**os.environ, **{each["name"]: str(tmp_path) for each in container["env"]}}
        asked_it = subprocess.run(
            [NEMOSERVE, *arguments], env=home, capture_output=True, text=True, timeout=120, check=False
        )
        assert asked_it.returncode == 0, asked_it.stderr
        assert asked_it.stdout.strip()
    finally:
        assert running.stop() == 0
