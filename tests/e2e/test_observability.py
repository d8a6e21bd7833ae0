"""One real server that tells all it can: JSON lines, traces to a collector, metrics and load reports on both ports."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from tests.server import NEMOSERVE
from tests.service.telemetry.collector import Collector

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
QUESTION = "tell nobody"


class TellingServer:
    """`nemoserve serve --log-json`, whose every line must be an object."""

    def __init__(self, model: Path, collector: str) -> None:
        command = [NEMOSERVE, "serve", model, "--served-model-name", "toy", "--grpc-port", "0", "--http-port", "0"]
        self.process = subprocess.Popen(
            [*command, "--log-json", "--otlp-endpoint", collector],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[dict[str, Any]] = []
        listening = self.until("listening")
        self.address, self.http_address = listening["address"], listening["http_address"]
        self.until("ready")

    def until(self, event: str, **fields: str) -> dict[str, Any]:
        """The next line of this event with these fields."""
        assert self.process.stderr is not None
        for text in self.process.stderr:
            line = json.loads(text)
            self.lines.append(line)
            if line["event"] == event and all(line.get(name) == value for name, value in fields.items()):
                return line
        raise AssertionError(f"the server ended without {event}: {self.lines}")

    def get(self, path: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self.http_address, timeout=30)
        connection.request("GET", path)
        return connection.getresponse()

    def metrics(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        families = text_string_to_metric_families(self.get("/metrics").read().decode())
        return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(running, server)
    running.address = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield running
    server.stop(0)


def test_one_request_is_found_in_log_trace_and_metrics(smollm2_path: Path, collector: Collector) -> None:
    server = TellingServer(smollm2_path, collector.address)
    try:
        with grpc.insecure_channel(server.address) as channel:
            stub = rpc.GenerationServiceStub(channel)
            sampling = pb.SamplingParameters(max_tokens=5, temperature=0, ignore_eos=True)
            request = pb.GenerateRequest(request_id="mine", prompt=QUESTION, sampling=sampling)
            responses = list(stub.Generate(request, metadata=[("traceparent", PARENT)], timeout=60))
            load = stub.GetLoad(pb.GetLoadRequest(), timeout=10).load
        usage = responses[-1].finished.usage
        line = server.until("request", request_id="mine")
        assert (line["trace_id"], line["code"], line["model"]) == (TRACE, "ok", "toy")
        assert (line["prompt_tokens"], line["output_tokens"]) == (usage.prompt_tokens, 5)
        assert 0 < line["ttft_ms"] < line["total_ms"]

        body = {"model": "toy", "prompt": "x", "max_tokens": 2}
        connection = http.client.HTTPConnection(server.http_address, timeout=60)
        headers = {"content-type": "application/json", "endpoint-load-metrics-format": "JSON", "traceparent": PARENT}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        report = json.loads(answer.headers["endpoint-load-metrics"].removeprefix("JSON "))
        assert set(report["named_metrics"]) == {"num_requests_waiting", "num_requests_running"}
        said = json.loads(answer.read())["usage"]
        line = server.until("request", method="POST /v1/completions")
        assert (line["trace_id"], line["output_tokens"]) == (TRACE, said["completion_tokens"])

        metrics = server.metrics()
        model = frozenset({("model", "toy")})
        generated = 5 + said["completion_tokens"]
        assert metrics["nemoserve_generation_tokens_total", model] == generated
        assert metrics["nemoserve_prompt_tokens_total", model] == usage.prompt_tokens + said["prompt_tokens"]
        assert metrics["nemoserve_time_to_first_token_seconds_count", model] == 2
        # What the engine counts is what clients got: no step was for nothing here.
        assert load.generated_tokens == 5
        assert metrics["nemoserve_batch_tokens_sum", frozenset()] >= generated
        assert metrics["nemoserve_engine_step_seconds_count", frozenset()] > 2
        assert metrics["vllm:num_requests_waiting", frozenset({("model_name", "toy")})] == 0
    finally:
        server.process.send_signal(signal.SIGTERM)
        rest = server.process.communicate(timeout=60)[1]
    assert server.process.returncode == 0
    lines = [*server.lines, *map(json.loads, rest.splitlines())]
    assert QUESTION not in json.dumps(lines)
    within = [span for span in collector.spans if span.trace_id.hex() == TRACE]
    assert {span.name for span in within} >= {
        "nemoserve.v1.GenerationService/Generate",
        "POST /v1/completions",
        "text_completion toy",
        "queue",
        "prefill",
        "decode",
    }
    assert QUESTION not in str(collector.spans)
