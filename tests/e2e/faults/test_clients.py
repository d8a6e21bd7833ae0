"""Clients that read slowly, connect and say nothing, or vanish: what they hold is bounded, and others do not notice."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import ServerProcess
from tests.e2e.faults.aftermath import forget_peak, memory, metrics, nothing_left, value
from tests.e2e.faults.clients import Ask, Clients, End
from tests.e2e.faults.conftest import Dose

BESIDE = Ask("The capital of France is", tokens=100)
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = b'{"model": "model", "prompt": "x", "max_tokens": 3000, "ignore_eos": true, "stream": true}'


@asynccontextmanager
async def undisturbed(server: ServerProcess) -> AsyncIterator[None]:
    """Around something hostile: what others ask for meanwhile is answered as if they were alone, and memory is
    bounded."""
    with nothing_left(server) as ledger:
        async with Clients(server) as clients:
            said = (await ledger.count(clients.ask(BESIDE, 0))).text
            forget_peak(server.process.pid)
            held = memory(server.process.pid)
            over = asyncio.Event()

            async def ask() -> int:
                number = 0
                while number < 3 or not over.is_set():
                    ended = await clients.ask(BESIDE, number)
                    assert (ended.how, ended.text) == (End.DONE, said)
                    number += 1
                return number

            beside = asyncio.create_task(ask())
            try:
                yield
            finally:
                over.set()
                answers = await beside
            peak = memory(server.process.pid, "VmHWM") - held
            print(f"{answers} answers beside it; at most {peak / 2**20:.0f} MiB more")
            assert peak < 128 * 2**20
        ledger.sent, ledger.ends = 0, []  # what is hostile is counted too, and not here


def opened(address: str) -> socket.socket:
    host, port = address.split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def stuck(kind: str, address: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.e2e.faults.stuck", kind, address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])


@pytest.mark.parametrize("kind", ["grpc", "http"])
async def test_a_client_that_is_stopped_is_cut_off_with_little_kept_for_it(tiny: ServerProcess, kind: str) -> None:
    address = tiny.address if kind == "grpc" else tiny.http_address
    async with undisturbed(tiny):
        process = stuck(kind, address)
        try:
            assert process.stdout is not None
            assert await asyncio.to_thread(process.stdout.readline) == b"reading\n"
            process.send_signal(signal.SIGSTOP)
            cut = value(await asyncio.to_thread(metrics, tiny), "nemoserve_slow_readers_total")
            async with asyncio.timeout(180):
                while value(await asyncio.to_thread(metrics, tiny), "nemoserve_slow_readers_total") == cut:
                    await asyncio.to_thread(time.sleep, 0.1)  # scrapes without a pause take the engine's cores
        finally:
            process.kill()
            process.wait(10)


async def test_a_connection_that_is_reset_in_mid_stream_frees_what_it_held(tiny: ServerProcess) -> None:
    async with undisturbed(tiny):
        for _ in range(20):
            with opened(tiny.http_address) as connection:
                connection.sendall(HEAD + f"Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY)
                connection.recv(1)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST, not FIN
            await asyncio.sleep(0)


async def test_connections_that_say_nothing_or_little_cost_nothing(tiny: ServerProcess, dose: Dose) -> None:
    """Idle, half a head, half a body, half an HTTP/2 preface; of each a quarter, on both ports."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    starts = [b"", HEAD, HEAD + b"Content-Length: 1000\r\n\r\n{", b"PRI * HTTP/2.0\r\n"]
    connections = []
    try:
        async with undisturbed(tiny):
            for number in range(dose.idle_connections):
                connections.append(opened(tiny.address if number % 2 else tiny.http_address))
                connections[-1].sendall(starts[number // 2 % len(starts)])
                await asyncio.sleep(0)
            async with Clients(tiny) as newcomers:
                for kind in range(3):
                    assert (await newcomers.ask(BESIDE, kind)).how is End.DONE
    finally:
        for connection in connections:
            connection.close()


async def test_a_peer_that_is_gone_without_a_word_is_noticed(tiny: ServerProcess) -> None:
    """Its process is killed in mid-stream."""
    async with undisturbed(tiny):
        for kind, address in (("grpc", tiny.address), ("http", tiny.http_address)):
            process = stuck(kind, address)
            assert process.stdout is not None
            assert await asyncio.to_thread(process.stdout.readline) == b"reading\n"
            os.kill(process.pid, signal.SIGKILL)
            process.wait(10)
