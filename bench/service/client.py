"""`python -m bench.service.client`: asks a server for streams of tokens, each on a connection of its own, and reads
them with as little work as Python allows. A Task as JSON on standard input, a Load as JSON on standard output.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path as FilePath

import msgspec

from bench.measure import percentile
from bench.peers.processes import family
from bench.service.engine import DIGITS, age
from bench.service.paths import KServe, OpenAI, Path, Typed
from bench.service.wire import Reader

READ_BYTES = 2**18
SILENT_SECONDS = 30.0
WARM_UP_TOKENS = 20  # of each stream, before the clock starts
TICKS = os.sysconf("SC_CLK_TCK")


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What to ask for.

    Attributes:
        path: kserve, typed or openai.
        server: the process whose time, with its children's, is taken.
        model: whom to ask.
        headers: that every request brings, for keys.
    """

    path: str
    address: str
    server: int
    model: str
    streams: int
    tokens: int
    headers: dict[str, str] = {}


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What came.

    Attributes:
        messages: those with text. Tokens that come together are one.
        seconds: from the first request to the last message.
        server_cpu_seconds, client_cpu_seconds: user and system time within them, of whole process trees.
        late_*: from a token's making to its arrival, over all tokens.
    """

    streams: int
    tokens: int
    messages: int
    seconds: float
    server_cpu_seconds: float
    client_cpu_seconds: float
    late_p50_seconds: float
    late_p99_seconds: float

    @property
    def messages_per_second(self) -> float:
        return self.messages / self.seconds

    @property
    def server_seconds_per_message(self) -> float:
        return self.server_cpu_seconds / self.messages

    @property
    def server_seconds_per_token(self) -> float:
        return self.server_cpu_seconds / self.tokens


def path_of(task: Task) -> Path:
    paths: Mapping[str, Path] = {"kserve": KServe(task.model), "typed": Typed(), "openai": OpenAI()}
    return paths[task.path]


def run(task: Task) -> Load:
    """Raises RuntimeError: other tokens came than were asked for."""
    path = path_of(task)
    host, _, port = task.address.rpartition(":")
    readers: dict[socket.socket, Reader] = {}
    for _ in range(task.streams):
        connection = socket.create_connection((host, int(port)))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(path.open())
        readers[connection] = path.reader()
    request = path.request(task.address, task.tokens, task.headers)
    before, own, began = cpu_seconds(task.server), time.process_time(), time.monotonic()
    for connection in readers:
        connection.sendall(request)
    _read_all(readers)
    ended = time.monotonic()
    own, server = time.process_time() - own, cpu_seconds(task.server) - before
    ages, messages = [], 0
    for reader in readers.values():
        tokens = 0
        for arrived, message in reader.messages():
            text = path.text(message)
            messages += bool(text)
            tokens += len(text) // DIGITS
            ages += [age(int(text[at : at + DIGITS]), arrived) for at in range(0, len(text), DIGITS)]
        if tokens != task.tokens:
            raise RuntimeError(f"{tokens} tokens came and not {task.tokens}")
    for connection in readers:
        connection.close()
    return Load(
        streams=task.streams,
        tokens=task.tokens * task.streams,
        messages=messages,
        seconds=ended - began,
        server_cpu_seconds=server,
        client_cpu_seconds=own,
        late_p50_seconds=percentile(ages, 50),
        late_p99_seconds=percentile(ages, 99),
    )


def _read_all(readers: Mapping[socket.socket, Reader]) -> None:
    """Until every answer has ended."""
    open_ones = len(readers)
    with selectors.DefaultSelector() as selector:
        for connection, reader in readers.items():
            selector.register(connection, selectors.EVENT_READ, (connection, reader))
        while open_ones:
            ready = selector.select(SILENT_SECONDS)
            if not ready:
                raise RuntimeError(f"nothing came for {SILENT_SECONDS:g} seconds")
            for key, _ in ready:
                connection, reader = key.data
                data = connection.recv(READ_BYTES)
                if answer := reader.feed(data, time.monotonic()):
                    connection.sendall(answer)
                if reader.ended or not data:
                    selector.unregister(connection)
                    open_ones -= 1


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and of all that descend from it. Source: proc_pid_stat(5)."""
    total = 0
    for each in family(pid):
        fields = FilePath(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def main() -> None:
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    run(msgspec.structs.replace(task, tokens=WARM_UP_TOKENS))
    sys.stdout.buffer.write(msgspec.json.encode(run(task)))


if __name__ == "__main__":
    main()
