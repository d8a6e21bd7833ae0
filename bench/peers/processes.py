"""Server processes under test: started with a time limit, weighed with all their children, stopped for certain."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator

import grpc
import httpx
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from bench.measure import children, peak_rss_bytes


class ServerFailedError(Exception):
    """A server did not come up; the message has the last lines that it wrote."""


@contextlib.contextmanager
def running(
    command: list[str], ready: Callable[[], bool], timeout: float, env: dict[str, str] | None = None
) -> Iterator[int]:
    """Start a server in a session of its own and wait until it is ready. Yields its process id.

    Args:
        ready: asked ten times a second.
        timeout: seconds until it must say yes.

    Raises:
        ServerFailedError: it ended, or was not ready in time.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | (env or {}), start_new_session=True
        )
        try:
            _wait(process, ready, timeout, command[0])
            yield process.pid
        except ServerFailedError as error:
            log.seek(0)
            raise ServerFailedError(f"{error}\nits last words:\n" + "".join(log.readlines()[-15:])) from None
        finally:
            _stop(process)


def _wait(process: subprocess.Popen[bytes], ready: Callable[[], bool], timeout: float, name: str) -> None:
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        if (status := process.poll()) is not None:
            raise ServerFailedError(f"{name} ended with status {status}")
        if ready():
            return
        time.sleep(0.1)
    raise ServerFailedError(f"{name} was not ready after {timeout:g} seconds")


def answers(url: str) -> bool:
    """A GET of it gives 200."""
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=5).status_code == 200
    return False


def serves(address: str) -> bool:
    """A gRPC server there says that it serves (grpc.health.v1)."""
    with grpc.insecure_channel(address) as channel, contextlib.suppress(grpc.RpcError):
        answer = HealthStub(channel).Check(HealthCheckRequest(), timeout=5)
        return bool(answer.status == HealthCheckResponse.SERVING)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and everything that it started."""
    for sign, patience in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            found += children(parent)
    return found


def peak_bytes(pid: int) -> int:
    """Sum of the largest resident sets of a process and its descendants; pages that they share count in each."""
    total = 0
    for each in family(pid):
        with contextlib.suppress(OSError):
            total += peak_rss_bytes(each)
    return total
