"""A real server process for the end-to-end tests: `nemoserve serve` as a user starts it, on a free loopback port."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc

import tests.server

STEP_TOKENS = 64
POLL_SECONDS = 0.01  # without a pause the test takes a core from the engine that it waits for


class ServerProcess(tests.server.ServerProcess):
    """With what the typed API tells of it."""

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
            time.sleep(POLL_SECONDS)
        return load


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
