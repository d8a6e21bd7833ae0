"""A real server process for the end-to-end tests: `nemoserve serve` as a user starts it, on a free loopback port."""

from __future__ import annotations

import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
import torch
import transformers
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc

NEMOSERVE = Path(sys.executable).parent / "nemoserve"
READY_SECONDS = 90
STEP_TOKENS = 64


@dataclass
class ServerProcess:
    """A running `nemoserve serve`; `lines` is what it has printed so far, stdout and stderr together."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    address: str = ""
    http_address: str = ""

    @classmethod
    def start(cls, *args: str | Path) -> ServerProcess:
        process = subprocess.Popen(
            [str(NEMOSERVE), "serve", *map(str, args), "--grpc-port", "0", "--http-port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        server = cls(process)
        fresh: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=server._read, args=(fresh,), daemon=True).start()
        limit = time.monotonic() + READY_SECONDS
        while not server.address:
            line = fresh.get(timeout=max(0.0, limit - time.monotonic()))
            assert line is not None, "the server ended before it was ready:\n" + "".join(server.lines)
            if found := re.search(r"ready at (127\.0\.0\.1:\d+) \(gRPC\) and https?://(127\.0\.0\.1:\d+)/v1", line):
                server.address, server.http_address = found[1], found[2]
        return server

    def _read(self, fresh: queue.SimpleQueue[str | None]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            fresh.put(line)
        fresh.put(None)

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.address)

    def load(self) -> pb.Load:
        with self.channel() as channel:
            return rpc.GenerationServiceStub(channel).GetLoad(pb.GetLoadRequest(), timeout=10).load

    def until(self, condition: str, check: object, seconds: float = 10.0) -> pb.Load:
        """Poll the load until `check(load)` holds."""
        assert callable(check)
        limit = time.monotonic() + seconds
        while not check(load := self.load()):
            assert time.monotonic() < limit, f"never saw {condition}: {load}"
        return load

    def stop(self, seconds: float = 30.0) -> int:
        """SIGTERM, then the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)


@pytest.fixture(scope="session")
def reference(smollm2_path: Path) -> transformers.PreTrainedModel:
    """The embedded model in float32 as transformers reads it. Who changes its weights puts them back."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="session")
def server(smollm2_path: Path) -> Iterator[ServerProcess]:
    """One server with the embedded model, shared by the tests that leave it as they found it."""
    running = ServerProcess.start(smollm2_path, "--served-model-name", "smollm2-135m-instruct")
    yield running
    assert running.stop() == 0, "".join(running.lines)


@pytest.fixture(scope="session")
def exact_server(smollm2_path: Path) -> Iterator[ServerProcess]:
    """The same in float32, which can be compared with other programs; prompts take several steps."""
    running = ServerProcess.start(smollm2_path, "--dtype", "fp32", "--max-batch-tokens", str(STEP_TOKENS))
    yield running
    assert running.stop() == 0, "".join(running.lines)


@pytest.fixture
def own_server(smollm2_path: Path) -> Iterator[ServerProcess]:
    """A server of the test's own, to be broken."""
    running = ServerProcess.start(smollm2_path, "--served-model-name", "smollm2-135m-instruct")
    yield running
    running.kill()


@pytest.fixture
def typed(server: ServerProcess) -> Iterator[rpc.GenerationServiceStub]:
    with server.channel() as channel:
        yield rpc.GenerationServiceStub(channel)
