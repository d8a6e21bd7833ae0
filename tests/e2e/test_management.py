"""NIM's management routes of a real server, and a model that was carried to it as a folder of its own."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.version import VERSION
from tests.e2e.conftest import ServerProcess
from tests.server import NEMOSERVE


def get(server: ServerProcess, route: str) -> Any:
    with urllib.request.urlopen(f"http://{server.http_address}{route}", timeout=30) as answer:
        body = answer.read()
        return yaml.safe_load(body) if "yaml" in answer.headers["content-type"] else json.loads(body)


def test_a_server_says_what_it_is_and_runs(server: ServerProcess) -> None:
    assert get(server, "/v1/health/live")["status"] == "live"
    assert get(server, "/v1/health/ready")["status"] == "ready"
    assert get(server, "/v1/version")["release"] == VERSION
    assert "Apache License" in get(server, "/v1/license")["content"]
    profile = get(server, "/v1/metadata")["selectedModelProfileId"]
    assert "/cpu-" in profile
    assert profile in [each["id"] for each in get(server, "/v1/manifest")["profiles"]]
    [ready] = [line for line in server.lines if " ready " in line and "kv_tokens=65536" in line]
    assert f"profile={profile}" in ready
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(server, "/v1/nothing")


def test_a_model_that_was_carried_over_is_served_without_a_network(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = [NEMOSERVE, "store", smollm2_path, "--to", tmp_path / "carried"]
    assert subprocess.run(store, capture_output=True, timeout=120, check=False).returncode == 0
    config = tmp_path / "nemoserve.yaml"
    config.write_text("max_model_len: 512\nlog_level: warning\n")
    monkeypatch.setenv("NIM_MODEL_PATH", str(tmp_path / "carried"))
    monkeypatch.setenv("NIM_SERVED_MODEL_NAME", "mine,other")
    monkeypatch.setenv("NIM_KVCACHE_PERCENT", "0.05")
    monkeypatch.setenv("NIM_LOG_LEVEL", "INFO")
    monkeypatch.setenv("NIM_DISABLE_MODEL_DOWNLOAD", "1")
    monkeypatch.setenv("NIM_SOMETHING", "1")
    server = ServerProcess.start("--config", config)
    try:
        assert get(server, "/v1/metadata")["modelInfo"][0]["shortName"] == smollm2_path.stem
        assert [each["id"] for each in get(server, "/v1/models")["data"]][:2] == ["mine", "other"]
        log = "".join(server.lines)
        assert "max_model_len=512" in log
        assert "unknown variable variable=NIM_SOMETHING" in log
    finally:
        assert server.stop() == 0
