"""A replica that goes while clients keep their connections to it, as the operator lets it go: first it is no endpoint
of the Service any more, then it gets SIGTERM. Clients use the service config which we ship."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc

from tests.e2e.conftest import ServerProcess
from tests.service_address import SERVICE_CONFIG, service_address

CLIENTS = 3


def story(tokens: int) -> pb.GenerateRequest:
    sampling = pb.SamplingParameters(max_tokens=tokens, temperature=0, ignore_eos=True)
    return pb.GenerateRequest(prompt="Once upon a time", sampling=sampling)


def tokens_of(call: Iterator[pb.GenerateResponse]) -> int:
    return [each.finished.usage.completion_tokens for each in call if each.HasField("finished")][-1]


@pytest.fixture
def leaving(smollm2_path: Path) -> Iterator[ServerProcess]:
    running = ServerProcess.start(smollm2_path, "--served-model-name", "smollm2-135m-instruct", "--lame-duck", "0.5")
    yield running
    running.kill()


class Clients:
    """Each asks again as soon as it has its answer, all over one channel."""

    def __init__(self, service: rpc.GenerationServiceStub) -> None:
        self.answers: list[int] = []
        self._service = service
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(CLIENTS)
        self._asking = [self._pool.submit(self._ask) for _ in range(CLIENTS)]
        self._answered = threading.Semaphore(0)

    def _ask(self) -> None:
        while not self._stop.is_set():
            self.answers.append(tokens_of(self._service.Generate(story(5), timeout=60)))
            self._answered.release()

    def have(self, more: int) -> None:
        for _ in range(more):
            assert self._answered.acquire(timeout=60)

    def end(self) -> None:
        """Raises what any of them met."""
        self._stop.set()
        for each in self._asking:
            each.result(60)


def test_what_leaves_the_service_and_then_gets_sigterm_loses_no_request_of_clients_that_stay_connected(
    leaving: ServerProcess, server: ServerProcess
) -> None:
    before = server.load().arrived_requests
    options = [("grpc.service_config", SERVICE_CONFIG.read_text())]
    with service_address(leaving.address) as service, grpc.insecure_channel(service.address, options) as channel:
        stub = rpc.GenerationServiceStub(channel)
        clients = Clients(stub)
        clients.have(2 * CLIENTS)

        service.endpoint = server.address  # its pod has lost the label
        at = leaving.load().arrived_requests
        clients.have(2 * CLIENTS)
        assert leaving.load().arrived_requests > at  # who is connected stays
        assert server.load().arrived_requests == before

        long = stub.Generate(story(120), timeout=60)
        assert next(long).HasField("started")
        leaving.process.send_signal(signal.SIGTERM)
        assert tokens_of(long) == 120
        assert leaving.process.wait(30) == 0
        clients.have(2 * CLIENTS)
        clients.end()

    assert set(clients.answers) == {5}
    assert set(service.connections) == {leaving.address, server.address}
    assert server.load().arrived_requests > before
