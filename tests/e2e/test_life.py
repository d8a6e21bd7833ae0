"""Start, drain, crash and refusal of the real server process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc

from bench.measure import children
from tests.e2e.conftest import ServerProcess
from tests.server import NEMOSERVE


def story(tokens: int) -> pb.GenerateRequest:
    sampling = pb.SamplingParameters(max_tokens=tokens, temperature=0, ignore_eos=True)
    return pb.GenerateRequest(prompt="Once upon a time", sampling=sampling)


def engine_of(server: ServerProcess) -> int:
    [pid] = [child for child in children(server.process.pid) if b"engine.worker" in command_of(child)]
    return pid


def command_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


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


# -- the engine dies, hangs, is exchanged ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def enduring(smollm2_path: Path) -> Iterator[ServerProcess]:
    """A server whose engine the tests break; each of them leaves it ready."""
    model = (smollm2_path, "--served-model-name", "smollm2-135m-instruct")
    options = ("--engine-timeout", "5", "--engine-restarts", "9", "--model-control", "explicit")
    running = ServerProcess.start(*model, *options)
    yield running
    assert running.stop() == 0, "".join(running.lines)


def statuses(channel: grpc.Channel, service: str) -> Iterator[bool]:
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service), timeout=120)
    return (each.status == health_pb2.HealthCheckResponse.SERVING for each in watch)


def ends(call: Any) -> tuple[str, float]:
    """How a call ended, and when."""
    try:
        last = list(call)[-1].WhichOneof("event")
    except grpc.RpcError as error:
        return error.code().name, time.monotonic()
    return str(last), time.monotonic()


def test_a_killed_engine_fails_what_runs_within_a_second_and_comes_back(enduring: ServerProcess) -> None:
    with enduring.channel() as channel, ThreadPoolExecutor(8) as pool:
        service = rpc.GenerationServiceStub(channel)
        ready = statuses(channel, "nemoserve.ready")
        assert next(ready)
        calls = [service.Generate(story(4000), timeout=120) for _ in range(8)]
        assert {next(call).WhichOneof("event") for call in calls} == {"started"}
        rest = [pool.submit(ends, call) for call in calls]
        killed = time.monotonic()
        os.kill(engine_of(enduring), signal.SIGKILL)
        found = [future.result() for future in rest]
        assert [end for end, _ in found] == ["UNAVAILABLE"] * 8
        seconds = max(at for _, at in found) - killed
        print(f"killed to the last error: {seconds:.3f} s")
        assert seconds < 1
        assert not next(ready)
        assert next(ready)
        print(f"killed to ready: {time.monotonic() - killed:.1f} s")
        assert ends(service.Generate(story(4), timeout=60))[0] == "finished"
    assert any("engine lost, starting it again" in line and "signal 9" in line for line in enduring.lines)


def test_an_engine_that_hangs_turns_live_off_and_is_replaced(enduring: ServerProcess) -> None:
    with enduring.channel() as channel:
        service = rpc.GenerationServiceStub(channel)
        live = statuses(channel, "nemoserve.live")
        assert next(live)
        call = service.Generate(story(4000), timeout=120)
        next(call)
        hung = engine_of(enduring)
        os.kill(hung, signal.SIGSTOP)
        assert not next(live)
        assert ends(call)[0] == "UNAVAILABLE"
        assert next(live)
        enduring.until("the model is ready", lambda load: load.phase == pb.PHASE_READY, seconds=60)
        assert not Path(f"/proc/{hung}").exists()
        assert ends(service.Generate(story(4), timeout=60))[0] == "finished"


def test_tritons_client_unloads_and_loads_the_model(enduring: ServerProcess) -> None:
    name = "smollm2-135m-instruct"
    with triton.InferenceServerClient(enduring.address) as client:
        text = triton.InferInput("text_input", [1], "BYTES")
        text.set_data_from_numpy(np.array([b"The capital of France is"], dtype=object))

        def ask() -> str:
            answer = client.infer(name, [text], client_timeout=60, parameters={"temperature": 0})
            return bytes(answer.as_numpy("text_output")[0]).decode()

        before = ask()
        client.unload_model(name)
        assert not client.is_model_ready(name)
        assert {model.state for model in client.get_model_repository_index().models} == {"UNAVAILABLE"}
        assert enduring.load().phase == pb.PHASE_UNLOADED
        assert [pid for pid in children(enduring.process.pid) if b"engine.worker" in command_of(pid)] == []
        with pytest.raises(triton.InferenceServerException, match="is unloaded"):
            ask()
        client.load_model(name, client_timeout=60)
        assert client.is_model_ready(name)
        assert ask() == before
        waiting = ThreadPoolExecutor(1).submit(client.load_model, name, client_timeout=60)
        enduring.until("it loads", lambda load: load.phase == pb.PHASE_LOADING)
        assert ask() == before  # waited for it
        waiting.result()
        with pytest.raises(triton.InferenceServerException, match="not in the model store"):
            client.load_model(name, config='{"parameters": {"model": {"string_value": "mistral-nemo-12b"}}}')
        with pytest.raises(triton.InferenceServerException, match="must be a name of the catalogue"):
            client.load_model(name, config='{"parameters": {"model": {"string_value": "../../etc"}}}')
        assert ask() == before


# -- told to stop before it is ready -----------------------------------------------------------------------------------


def stopped_after(line: str, *args: str, **environment: str) -> tuple[int, float]:
    """Exit code of a server that gets SIGTERM when it has logged the line, and how long it took for that."""
    process = subprocess.Popen(
        [str(NEMOSERVE), "serve", *args, "--grpc-port", "0", "--http-port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        assert process.stderr is not None
        assert any(line in each for each in process.stderr)
        told = time.monotonic()
        process.send_signal(signal.SIGTERM)
        return process.wait(30), time.monotonic() - told
    finally:
        process.kill()


def test_sigterm_while_the_model_loads_ends_the_server_at_once(smollm2_path: Path) -> None:
    code, seconds = stopped_after("listening", str(smollm2_path))
    print(f"{seconds:.2f} s")
    assert code == 0
    assert seconds < 5


def test_sigterm_while_the_model_is_fetched_ends_the_server_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hub:  # takes connections and never answers
        where = f"http://127.0.0.1:{hub.getsockname()[1]}"
        code, seconds = stopped_after(
            "listening", "hf://some/model", HF_ENDPOINT=where, NEMOSERVE_CACHE=str(tmp_path), HF_HUB_OFFLINE="0"
        )
    print(f"{seconds:.2f} s")
    assert code == 0
    assert seconds < 5
    assert [path for path in tmp_path.rglob("*.safetensors")] == []


def test_health_and_reflection(server: ServerProcess) -> None:
    with server.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "nemoserve.live", "nemoserve.ready", "inference.GRPCInferenceService"):
            status = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status
            assert status == health_pb2.HealthCheckResponse.SERVING


def serve(*args: object) -> subprocess.CompletedProcess[str]:
    command = [str(NEMOSERVE), "serve", *map(str, args), "--grpc-port", "0", "--http-port", "0"]
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
