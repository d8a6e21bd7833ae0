"""The engine in a process of its own: faults of either side, and that the border carries what it must."""

from __future__ import annotations

import asyncio
import fcntl
import json
import math
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

import engine.remote
from engine.config import EngineConfig
from engine.errors import CheckpointError, EngineConfigError, EngineDeadError
from engine.face import Done
from engine.loop import Cancel, Submit
from engine.remote import RemoteEngine
from engine.request import FinishReason, Request, SamplingParams, TokenEvent
from engine.wire import (
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    Failed,
    Loading,
    Start,
    ToWorker,
    body_length,
    decode_from_worker,
    decode_to_worker,
    encode,
)
from engine.worker import Inbox, LoadingBeat, Outbox
from tests.tiny_models import write_hf

in_loop_of_remote = pytest.mark.asyncio(loop_scope="module")  # the one that the shared engine belongs to
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    model = write_hf(tmp_path_factory.mktemp("tiny") / "model")
    return EngineConfig(model_path=str(model), threads=1, max_batch_size=3, page_size=8)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def remote(config: EngineConfig) -> AsyncIterator[RemoteEngine]:
    engine = await RemoteEngine.start(config)
    yield engine
    await engine.close()


def request(max_tokens: int = 400, **sampling: object) -> Request:
    params = SamplingParams(**({"max_tokens": max_tokens, "ignore_eos": True, "seed": 3} | sampling))
    return Request(request_id="same for all", prompt_token_ids=[5, 6, 7], sampling=params)


async def collect(engine: RemoteEngine, each: Request) -> list[TokenEvent]:
    return [event async for event in engine.generate(each)]


# -- a healthy engine ------------------------------------------------------------------------------------------


async def test_loading_shows_life_and_then_facts(config: EngineConfig) -> None:
    seen: list[tuple[str, Done]] = []
    engine = await RemoteEngine.start(config, lambda phase, done: seen.append((phase, done)))
    try:
        assert {phase for phase, _ in seen} >= {"read weights", "warm up"}
        assert all(isinstance(done, Done) for _, done in seen)
        assert [done.fraction for _, done in seen] == sorted(done.fraction for _, done in seen)
        assert seen[-1][1].fraction == 1.0
        assert (engine.info.vocab_size, engine.info.page_size, engine.info.max_batch_size) == (160, 8, 3)
        assert engine.heartbeat_age < 5.0
    finally:
        await engine.close()
        await engine.close()  # again: nothing happens
    with pytest.raises(EngineDeadError, match="the engine was closed"):
        await collect(engine, request())
    with pytest.raises(ProcessLookupError):
        os.kill(engine.pid, 0)


@in_loop_of_remote
async def test_requests_with_one_name_get_their_own_events(remote: RemoteEngine) -> None:
    requests = [request(n + 1, seed=n, logprobs=2) for n in range(8)]
    results = await asyncio.gather(*(collect(remote, each) for each in requests))
    assert [sum(len(event.token_ids) for event in events) for events in results] == list(range(1, 9))
    assert all(events[-1].finish_reason is FinishReason.LENGTH for events in results)
    assert all(len(event.logprobs or []) == len(event.token_ids) for events in results for event in events)
    assert (remote.stats.running, remote.stats.kv_pages_used) == (0, 0)


@in_loop_of_remote
async def test_closing_the_iterator_stops_the_work_and_frees_the_pages(remote: RemoteEngine) -> None:
    before = remote.stats.generated_tokens
    streams = [remote.generate(request()) for _ in range(3)]
    for stream in streams:
        await anext(stream)
    for stream in streams:
        await stream.aclose()
    await collect(remote, request(1))
    assert (remote.stats.running, remote.stats.queued, remote.stats.kv_pages_used) == (0, 0, 0)
    assert remote.stats.generated_tokens - before < 1000


@in_loop_of_remote
async def test_signals_for_the_service_do_not_end_the_engine(remote: RemoteEngine) -> None:
    assert os.getsid(remote.pid) == remote.pid  # Ctrl-C of a terminal does not reach it either
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(remote.pid, number)
    assert (await collect(remote, request(3)))[-1].finish_reason is FinishReason.LENGTH


# -- faults of the worker --------------------------------------------------------------------------------------


async def test_when_the_process_is_killed_every_request_fails_at_once(config: EngineConfig) -> None:
    engine = await RemoteEngine.start(config)
    try:
        streams = [engine.generate(request()) for _ in range(5)]  # three run, two wait
        for stream in streams[:3]:
            await anext(stream)
        waiting = [asyncio.create_task(anext(stream)) for stream in streams[3:]]
        await asyncio.sleep(0)  # they submit
        os.kill(engine.pid, signal.SIGKILL)

        async def drain(number: int) -> None:
            if number >= 3:
                await waiting[number - 3]
            async for _ in streams[number]:
                pass

        async with asyncio.timeout(10):  # a machine that is busy with other things takes its time
            results = await asyncio.gather(*(drain(number) for number in range(5)), return_exceptions=True)
        assert [type(result) for result in results] == [EngineDeadError] * 5
        assert engine.failure == "the engine process is gone (killed by signal 9)"
        with pytest.raises(EngineDeadError, match="killed by signal 9"):
            await collect(engine, request())
    finally:
        await engine.close()


async def test_a_load_error_is_raised_as_the_type_that_it_was(config: EngineConfig, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    broken = msgspec.structs.replace(config, model_path=str(tmp_path / "broken.gguf"))
    impossible = msgspec.structs.replace(config, max_model_len=100_000)
    starts = (RemoteEngine.start(broken), RemoteEngine.start(impossible))
    checkpoint, settings = await asyncio.gather(*starts, return_exceptions=True)
    assert type(checkpoint) is CheckpointError
    assert "broken.gguf" in str(checkpoint)
    assert type(settings) is EngineConfigError
    assert "max_model_len: 100000 must be at most" in str(settings)


WORKER_SCRIPT = """
import argparse, signal, socket
from engine.face import Done
from engine.wire import Loading, Ready, encode
from tests.engine.fake_runner import engine_info
parser = argparse.ArgumentParser()
parser.add_argument("--fd", type=int)
sock = socket.socket(fileno=parser.parse_args().fd)
sock.recv(4096)  # Start
"""
BECOME_READY = "sock.sendall(encode(Ready(engine_info())))\n"
UNTIL_THE_END = "while sock.recv(4096): pass\n"


def worker_that(monkeypatch: pytest.MonkeyPatch, *lines: str) -> EngineConfig:
    """From now on RemoteEngine starts this in place of the worker; it needs no torch."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(engine.remote, "WORKER", (sys.executable, "-c", WORKER_SCRIPT + "\n".join(lines)))
    return EngineConfig(model_path="-")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("raise SystemExit(3)", r"the engine process is gone \(exit code 3\)"),
        ("sock.sendall(b'\\0\\0\\0\\7garbage')", "the engine process sent what is no message"),
        ("sock.sendall(b'\\xff\\xff\\xff\\xff')", f"a frame of 4294967295 bytes is longer than {MAX_FRAME_BYTES}"),
        ("sock.sendall(encode(Ready(engine_info()))[:40])", r"the engine process is gone \(exit code 0\)"),
        ("sock.sendall(b'\\0\\0\\0\\1\\xc0'); sock.recv(1)", "the engine process sent what is no message"),
    ],
)
async def test_a_worker_that_breaks_while_loading_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    with pytest.raises(EngineDeadError, match=message):
        await RemoteEngine.start(worker_that(monkeypatch, line))


@pytest.mark.parametrize(
    "line", ["sock.sendall(b'\\0\\0\\0\\7garbage')", "sock.sendall(encode(Loading('again', Done(0.0))))"]
)
async def test_garbage_in_mid_stream_ends_all_requests_and_the_process(
    monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    config = worker_that(monkeypatch, BECOME_READY, "sock.recv(4096)", line, UNTIL_THE_END)
    remote = await RemoteEngine.start(config)
    with pytest.raises(EngineDeadError, match=r"no message|out of turn"):
        await asyncio.wait_for(collect(remote, request(5)), 5)
    await remote.close()
    with pytest.raises(ProcessLookupError):
        os.kill(remote.pid, 0)


async def test_a_worker_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.remote, "EXIT_SECONDS", 0.05)
    remote = await RemoteEngine.start(worker_that(monkeypatch, BECOME_READY, "signal.pause()"))
    await remote.close()
    with pytest.raises(ProcessLookupError):
        os.kill(remote.pid, 0)


async def test_a_stopped_worker_and_its_ranks_can_be_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank is a child of the worker, and of its process group."""
    start_rank = "import os, subprocess, sys; rank = subprocess.Popen(['sleep', '600'])"
    tell = "sock.sendall(encode(Loading(str(rank.pid), Done(0.0))))"
    config = worker_that(monkeypatch, start_rank, tell, BECOME_READY, UNTIL_THE_END)
    ranks: list[int] = []
    remote = await RemoteEngine.start(config, lambda phase, done: ranks.append(int(phase)))
    running = asyncio.create_task(collect(remote, request(5)))
    await asyncio.sleep(0)
    os.kill(remote.pid, signal.SIGSTOP)
    rank = os.pidfd_open(ranks[0])
    await asyncio.wait_for(remote.kill("no heart beat for 5 s"), 10)
    with pytest.raises(EngineDeadError, match="no heart beat for 5 s"):
        await running
    with pytest.raises(ProcessLookupError):
        os.kill(remote.pid, 0)
    assert select.select([rank], [], [], 10) == ([rank], [], [])  # it has ended
    os.close(rank)


async def test_a_start_that_is_cancelled_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    config = worker_that(
        monkeypatch, "import os", "sock.sendall(encode(Loading(str(os.getpid()), Done(0.0))))", UNTIL_THE_END
    )
    pids: asyncio.Queue[int] = asyncio.Queue()
    starting = asyncio.create_task(RemoteEngine.start(config, lambda phase, done: pids.put_nowait(int(phase))))
    pid = await pids.get()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# -- faults of the service -------------------------------------------------------------------------------------

SERVICE_SCRIPT = """
import asyncio, json, sys
from engine import EngineConfig, Request
from engine.remote import RemoteEngine
async def main():
    engine = await RemoteEngine.start(EngineConfig(model_path=sys.argv[1], threads=1))
    async for _ in engine.generate(Request(request_id="a", prompt_token_ids=[5])):
        pass
    print(json.dumps({"torch": "torch" in sys.modules, "pid": engine.pid}), flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_the_service_needs_no_torch_and_its_death_ends_the_worker(config: EngineConfig) -> None:
    service = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVICE_SCRIPT, config.model_path, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    assert service.stdout is not None
    said = json.loads(await asyncio.wait_for(service.stdout.readline(), 60))
    assert said["torch"] is False
    os.kill(said["pid"], 0)
    service.kill()
    await service.wait()
    # The worker holds the other copy of stdout, so the end of file is its end.
    assert await asyncio.wait_for(service.stdout.read(), 10) == b""


def start_worker() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "engine.worker", f"--fd={theirs.fileno()}"]
        process = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE)
    return ours, process


@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [
        (b"", 0, b""),
        (b"\0\0\0\7garbage", 1, b"the service sent what is no message"),
        (b"\xff\xff\xff\xff", 1, b"the service sent what is no message"),
        (encode(Cancel("a")), 1, b"the first message is Cancel, not Start"),
    ],
)
def test_a_worker_ends_at_once_when_its_service_goes_or_talks_nonsense(sent: bytes, code: int, said: bytes) -> None:
    ours, process = start_worker()
    with ours:
        ours.sendall(sent)
        if not sent:
            ours.shutdown(socket.SHUT_WR)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert said in errors


def test_a_failure_of_the_engine_is_not_blamed_on_the_service() -> None:
    script = """
import sys
import engine.runner, engine.worker

def load_runner(config, progress):
    raise ValueError("ours")

engine.runner.load_runner = load_runner
sys.exit(engine.worker.main())
"""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            command = [sys.executable, "-c", script, f"--fd={theirs.fileno()}"]
            process = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE)
        ours.sendall(encode(Start(EngineConfig(model_path="-", log_json=True))))
        _, errors = process.communicate(timeout=60)
        said = ours.recv(2**16)
    assert process.returncode == 1
    assert b"the service sent" not in errors
    line = json.loads(errors.splitlines()[-1])  # in the form that the service asked for
    assert (line["level"], line["event"]) == ("error", "the engine failed")
    assert line["traceback"].endswith("ValueError: ours")
    assert said.endswith(encode(Failed("", "the engine failed: ValueError")))


def test_a_worker_that_loads_ends_when_its_service_is_gone() -> None:
    script = """
import socket, threading
from engine.worker import LoadingBeat, Outbox
ours, theirs = socket.socketpair()
theirs.close()
with LoadingBeat(Outbox(ours)):
    threading.Event().wait(60)  # loading
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=30, check=False).returncode == 1


def test_progress_is_told_ten_times_a_second_and_beginnings_and_ends_always() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        beat = LoadingBeat(Outbox(theirs))
        for read in range(10_001):
            beat.report("read weights", Done(read / 10_000, read, 10_000))
        beat.report("warm up", Done(1.0, 10_000, 10_000))
        theirs.shutdown(socket.SHUT_WR)
        data = b"".join(iter(lambda: ours.recv(65536), b""))
    told = []
    while data:
        end = HEADER_BYTES + body_length(data[:HEADER_BYTES])
        message = decode_from_worker(data[HEADER_BYTES:end])
        assert isinstance(message, Loading)
        told.append((message.phase, message.done.read))
        data = data[end:]
    assert told[0] == ("read weights", 0)
    assert told[-2:] == [("read weights", 10_000), ("warm up", 10_000)]
    assert len(told) < 100


# -- frames ----------------------------------------------------------------------------------------------------

MESSAGES: list[ToWorker] = [
    Submit(
        Request(
            request_id="a",
            prompt_token_ids=[0, 131071],
            sampling=SamplingParams(seed=2**64 - 1, logit_bias={5: -math.inf, 7: 1.5}, stop_token_ids=(2,)),
            priority=-3,
        )
    ),
    Cancel("a"),
]


def test_messages_come_whole_however_the_bytes_are_cut() -> None:
    frames = b"".join(map(encode, MESSAGES))
    for cut in range(1, len(frames)):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            inbox, received = Inbox(theirs), []
            for piece in (frames[:cut], frames[cut:]):
                ours.sendall(piece)
                received += inbox.receive(0.0) or []
            assert received == MESSAGES
            ours.close()
            assert inbox.receive(5.0) is None


def test_a_descriptor_of_any_number_can_be_waited_for() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    ours, theirs = socket.socketpair()
    try:
        with ours, socket.socket(fileno=fcntl.fcntl(theirs, fcntl.F_DUPFD, 1100)) as high:
            assert high.fileno() > 1024
            ours.sendall(encode(Cancel("a")))
            assert Inbox(high).receive(5.0) == [Cancel("a")]
    finally:
        theirs.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_message_beyond_the_limit_is_not_sent() -> None:
    with pytest.raises(ValueError, match=f"longer than {MAX_FRAME_BYTES}"):
        encode(Cancel("a" * MAX_FRAME_BYTES))


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x80", msgspec.msgpack.encode({"type": "StepOutput"})])
def test_what_is_no_message_for_the_worker_is_refused(body: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_to_worker(body)
