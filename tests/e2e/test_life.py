"""Start, drain, crash and refusal of the real server process."""

from __future__ import annotations

import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc

from bench.measure import children
from tests.e2e.conftest import NEMOSERVE, ServerProcess


def story(tokens: int) -> pb.GenerateRequest:
    sampling = pb.SamplingParameters(max_tokens=tokens, temperature=0, ignore_eos=True)
    return pb.GenerateRequest(prompt="Once upon a time", sampling=sampling)


def engine_of(server: ServerProcess) -> int:
    [pid] = [
        child
        for child in children(server.process.pid)
        if b"engine.worker" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    return pid


def test_sigterm_under_load_loses_no_accepted_request(own_server: ServerProcess) -> None:
    with own_server.channel() as channel, ThreadPoolExecutor(8) as pool:
        service = rpc.GenerationServiceStub(channel)
        calls = [service.Generate(story(48), timeout=60) for _ in range(8)]
        assert {next(call).WhichOneof("event") for call in calls} == {"started"}
        rest = [pool.submit(list, call) for call in calls]
        # Neither of these ever ends by itself, and neither may hold up the end of the server.
        watched = service.WatchLoad(pb.WatchLoadRequest())
        assert next(watched).load.phase == pb.PHASE_READY
        own_server.process.send_signal(signal.SIGTERM)
        assert any(each.load.phase == pb.PHASE_DRAINING for each in watched)
        with pytest.raises(grpc.RpcError) as refused:
            list(service.Generate(story(1), timeout=10))
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        ends = [future.result()[-1].finished for future in rest]
        assert [end.usage.completion_tokens for end in ends] == [48] * 8
    assert own_server.process.wait(20) == 0


def test_a_dead_engine_fails_its_requests_at_once_and_the_server_says_so(own_server: ServerProcess) -> None:
    with own_server.channel() as channel:
        call = rpc.GenerationServiceStub(channel).Generate(story(4000), timeout=60)
        next(call)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="nemoserve.ready"))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        os.kill(engine_of(own_server), signal.SIGKILL)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert own_server.process.wait(20) == 70


def test_health_and_reflection(server: ServerProcess) -> None:
    with server.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "nemoserve.live", "nemoserve.ready", "inference.GRPCInferenceService"):
            status = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status
            assert status == health_pb2.HealthCheckResponse.SERVING


def serve(*args: object) -> subprocess.CompletedProcess[str]:
    command = [str(NEMOSERVE), "serve", *map(str, args), "--grpc-port", "0"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_truncated_checkpoint_is_one_clear_line(smollm2_path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(smollm2_path.read_bytes()[:10_000_000])
    done = serve(broken)
    assert done.returncode == 1
    assert "broken.gguf" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["no-such-model"], "no-such-model"),
        (["--max-batch-size", "0"], "max-batch-size"),
        (["--host", "0.0.0.0"], "anonymous"),
    ],
)
def test_wrong_usage_is_refused_by_name(args: list[str], names: str) -> None:
    done = serve(*args)
    assert done.returncode in (1, 2)
    assert names in done.stderr
    assert "Traceback" not in done.stderr
