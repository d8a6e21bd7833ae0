"""Load generators of other projects: each sends some requests, and its own report tells that none failed."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.conftest import MODEL, from_project
from tests.server import ServerProcess

BIN = Path(sys.executable).parent
REQUESTS = 12


def run(*command: str | Path, **environment: str) -> None:
    settings = {name: value for name, value in (os.environ | environment).items() if value}
    done = subprocess.run([*map(str, command)], env=settings, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_aiperf(server: ServerProcess, tokenizer: Path, tmp_path: Path) -> None:
    lengths = ("--isl", "32", "--osl", "8", "--extra-inputs", "ignore_eos:true")
    load = ("--streaming", "--concurrency", "4", "--request-count", str(REQUESTS), *lengths)
    where = ("--model", MODEL, "--url", f"http://{server.http_address}", "--endpoint-type", "chat")
    files = ("--tokenizer", tokenizer, "--artifact-dir", tmp_path, "--ui", "none")
    run(BIN / "aiperf", "profile", *where, *load, *files, HF_HUB_OFFLINE="")  # offline it takes paths for names
    report = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert report["request_count"]["avg"] == REQUESTS
    assert report["error_summary"] == []
    assert report["usage_completion_tokens"]["avg"] == 8


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_guidellm(server: ServerProcess, tokenizer: Path, tmp_path: Path, route: str) -> None:
    backend = f"kind=openai_http,target=http://{server.http_address},model={MODEL},request_format={route}"
    load = ("--profile", "kind=concurrent,streams=4", "--constraint", f"kind=max_requests,count={REQUESTS}")
    data = ("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8")
    files = ("--tokenizer", f"kind=huggingface_auto,model={tokenizer}")
    output = ("--output", f"kind=json,path={tmp_path / 'report.json'}", "--disable-console")
    run(BIN / "guidellm", "run", "--backend", backend, *load, *data, *files, *output)
    [benchmark] = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals == {"successful": REQUESTS, "errored": 0, "incomplete": 0, "total": REQUESTS}


@pytest.mark.parametrize("view", [MODEL, "tensorrt_llm_bls"])
def test_perf_analyzer_over_grpc(server: ServerProcess, tmp_path: Path, view: str) -> None:
    from_project("perf_analyzer", tmp_path)
    if view == MODEL:
        asked: dict[str, object] = {"stream": [True], "sampling_parameters": ['{"max_tokens": 8, "temperature": 0}']}
    else:
        asked = {"stream": [True], "max_tokens": [8], "temperature": [0.0]}
    data = tmp_path / "input.json"
    data.write_text(json.dumps({"data": [{"text_input": ["The capital of France is"], **asked}]}))
    window = ("--measurement-mode", "count_windows", "--measurement-request-count", str(REQUESTS))
    load = ("--streaming", "--concurrency-range", "4", *window, "--stability-percentage", "999")
    where = ("-m", view, "-u", server.address, "-i", "grpc", "--input-data", data, "-f", tmp_path / "report.csv")
    run(tmp_path / "perf_analyzer", *where, *load, LD_LIBRARY_PATH=str(tmp_path / "lib"))
    [row] = csv.DictReader((tmp_path / "report.csv").open())
    assert float(row["Inferences/Second"]) > 0
    assert float(row["Response Throughput"]) > float(row["Inferences/Second"])  # it streamed
