"""`bench.service`: what came is counted and timed right, whatever pieces it came in."""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Iterator

import pytest

from bench.measure import this_machine
from bench.peers.processes import free_port, running, serves
from bench.service.client import Load, Task, run
from bench.service.engine import age, stamp
from bench.service.report import Case, Measured, ServiceCost
from bench.service.server import MODEL
from bench.service.wire import DATA, END_STREAM, HEADERS, PING, GrpcReader, Reader, SseReader, frame, http_post

SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nx-request-id: c0\r\n\r\n"


@pytest.mark.parametrize("passed", [0.0, 0.25, 0.999])
def test_a_token_tells_how_old_it_is_also_across_a_full_second(passed: float) -> None:
    for made in (12.0, 12.3, 12.99999):
        assert age(stamp(made), made + passed) == pytest.approx(passed, abs=2e-5)


def pieces(data: bytes, rng: random.Random) -> Iterator[bytes]:
    while data:
        size = rng.randrange(1, 40)
        yield data[:size]
        data = data[size:]


def fed(reader: Reader, data: bytes) -> list[bytes]:
    rng = random.Random(3)
    for now, piece in enumerate(pieces(data, rng)):
        assert not reader.ended
        reader.feed(piece, float(now))
    assert reader.ended
    return [message for _, message in reader.messages()]


def test_messages_of_grpc_are_told_apart_wherever_frames_and_reads_cut_them() -> None:
    messages = [b"", b"one", b"x" * 300, b"last"]
    payload = b"".join(struct.pack(">BI", 0, len(message)) + message for message in messages)
    cut = [payload[:7], payload[7:150], payload[150:]]
    frames = [frame(HEADERS, 4, 1, b"\x88"), *(frame(DATA, 0, 1, part) for part in cut)]
    assert fed(GrpcReader(), b"".join(frames) + frame(HEADERS, END_STREAM | 4, 1, b"\x00")) == messages


def test_a_ping_is_answered() -> None:
    assert GrpcReader().feed(frame(PING, 0, 0, b"12345678"), 0.0) == frame(PING, 1, 0, b"12345678")


def test_events_are_told_apart_wherever_chunks_and_reads_cut_them() -> None:
    events = [b'{"a":1}', b'{"b":2}', b"[DONE]"]
    chunks = [b"data: %b\n\n" % event for event in events]
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    assert fed(SseReader(), SSE_HEAD + body + b"0\r\n\r\n") == events


def test_a_request_over_http_has_its_length() -> None:
    assert b"content-length: 2\r\n" in http_post("/v1/completions", "localhost", b"{}", {"x-api-key": "k"})


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[int, dict[str, str]]]:
    rpc, http = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    ports = [f"--grpc-port={rpc.rpartition(':')[2]}", f"--http-port={http.rpartition(':')[2]}"]
    command = [sys.executable, "-m", "bench.service.server", *ports]
    with running(command, lambda: serves(rpc), 60.0) as pid:
        yield pid, {"kserve": rpc, "typed": rpc, "openai": http}


@pytest.mark.parametrize("path", ["kserve", "typed", "openai"])
def test_every_path_brings_every_token(server: tuple[int, dict[str, str]], path: str) -> None:
    pid, addresses = server
    load = run(Task(path=path, address=addresses[path], server=pid, model=MODEL, streams=3, tokens=20))
    assert load.tokens == 60
    assert 3 <= load.messages <= 60
    assert 0 < load.late_p50_seconds <= load.late_p99_seconds < 1


def test_servers_are_compared_with_triton_at_as_many_streams() -> None:
    def measured(server: str, streams: int, seconds: float) -> Measured:
        load = Load(
            streams=streams,
            tokens=10,
            messages=10,
            seconds=seconds,
            server_cpu_seconds=seconds,
            client_cpu_seconds=0,
            late_p50_seconds=0,
            late_p99_seconds=0,
        )
        return Measured(case=Case(server=server, path="kserve", streams=streams, pace_seconds=0), load=load)

    turns = [measured("nemoserve", 1, 1), measured("triton", 1, 3), measured("triton", 2, 5), measured("triton", 1, 2)]
    result = ServiceCost(
        started_at="", machine=this_machine(), server_cores="0", client_cores="1", tokens=10, measured=turns
    )
    assert [load.seconds for load in result.rival(result.cases[0])] == [2, 3]
    assert result.rival(result.cases[1]) == []
