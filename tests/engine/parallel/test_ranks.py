"""Ranks as processes over gloo: the same tokens as one device, and their life with and without one another."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
from msgspec.structs import replace

import engine.parallel.followers
import engine.parallel.leader
from bench.measure import children
from engine.config import EngineConfig
from engine.errors import CheckpointError, EngineConfigError, EngineDeadError
from engine.face import Engine
from engine.local import LocalEngine
from engine.parallel.followers import Followers
from engine.parallel.leader import Leader
from engine.parallel.wire import Met, Point, Start, Step, encode, receive_from_follower, receive_to_follower
from engine.remote import RemoteEngine
from engine.request import Request, SamplingParams, TokenEvent, TokenLogprob
from engine.step import RowInit, RowWork, SlotFill, StepPlan, Targets
from engine.wire import Failed
from tests.engine.grammars import VOCABULARY, WANTED
from tests.tiny_models import write_gguf, write_hf

in_loop_of_ranks = pytest.mark.asyncio(loop_scope="module")  # the one that the shared engine belongs to
ROOT = Path(__file__).resolve().parents[3]
RANKS = 3  # the order in which two are added does not matter


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    """For one device. Greedy choices of this model are far from ties."""
    model = write_hf(tmp_path_factory.mktemp("tiny") / "model", num_key_value_heads=6)
    return EngineConfig(model_path=str(model), dtype="float32", threads=1, max_batch_size=3, page_size=8)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ranks(config: EngineConfig) -> AsyncIterator[RemoteEngine]:
    engine = await RemoteEngine.start(replace(config, tensor_parallel_size=RANKS))
    engine.set_vocabulary(VOCABULARY)
    yield engine
    await engine.close()


def requests() -> list[Request]:
    """Greedy, drawn, penalised, with logprobs of the prompt, with grammars; more than run at a time."""
    styles = (
        SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=3),
        SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, prompt_logprobs=2),
        SamplingParams(temperature=0.9, seed=4, top_p=0.9, max_tokens=16, ignore_eos=True),
        SamplingParams(temperature=0, repetition_penalty=1.2, max_tokens=20, ignore_eos=True),
        SamplingParams(temperature=0.8, seed=5, max_tokens=40, logprobs=1, grammar=WANTED["a person"].grammar),
        SamplingParams(temperature=0, max_tokens=20, grammar=WANTED["words"].grammar),
    )
    prompts = ([5, 6, 7], list(range(20, 60)), [9], list(range(3, 14)), [8, 9], [50])
    return [
        Request(request_id=str(i), prompt_token_ids=prompt, sampling=style)
        for i, (prompt, style) in enumerate(zip(prompts, styles, strict=True))
    ]


async def collect(engine: Engine, each: Request) -> list[TokenEvent]:
    return [event async for event in engine.generate(each)]


async def rest(stream: AsyncGenerator[TokenEvent]) -> None:
    async for _ in stream:
        pass


def tokens(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def logprobs(events: list[TokenEvent]) -> list[TokenLogprob]:
    return [logprob for event in events for logprob in event.logprobs or []]


def story(max_tokens: int = 400) -> Request:
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return Request(request_id="story", prompt_token_ids=[5, 6, 7], sampling=sampling)


def alive(pid: int) -> bool:
    """It runs. One that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def followers_of(process: int) -> list[int]:
    return [pid for pid in children(process) if b"parallel.follower" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def listening_on(pid: int) -> set[str]:
    """Addresses, as /proc has them, of the TCP ports that a process has open."""
    inodes = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, address, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in inodes:
                found.add(address.split(":")[0])
    return found


def until_gone(pids: list[int], seconds: float = 10.0) -> None:
    limit = time.monotonic() + seconds
    while any(map(alive, pids)):
        assert time.monotonic() < limit, f"still there: {[pid for pid in pids if alive(pid)]}"
        time.sleep(0.01)


# -- together --------------------------------------------------------------------------------------------------


@in_loop_of_ranks
async def test_tokens_are_those_of_one_device(config: EngineConfig, ranks: RemoteEngine) -> None:
    divided = await asyncio.gather(*(collect(ranks, each) for each in requests()))
    one = await LocalEngine.start(config)
    one.set_vocabulary(VOCABULARY)
    try:
        whole = await asyncio.gather(*(collect(one, each) for each in requests()))
    finally:
        await one.close()
    assert [tokens(events) for events in divided] == [tokens(events) for events in whole]
    values = [[each.logprob for each in logprobs(events[0])] for events in (divided, whole)]
    assert values[0] == pytest.approx(values[1], abs=1e-4)
    assert ranks.info.vocab_size == one.info.vocab_size
    assert ranks.info.num_parameters == one.info.num_parameters
    assert ranks.info.weight_bytes < 0.4 * one.info.weight_bytes


@in_loop_of_ranks
async def test_no_bit_depends_on_what_else_runs(ranks: RemoteEngine) -> None:
    crowd = await asyncio.gather(*(collect(ranks, each) for each in requests()))
    for each, together in zip(requests(), crowd, strict=True):
        alone = await collect(ranks, each)
        assert logprobs(alone) == logprobs(together)
        assert tokens(alone) == tokens(together)


@in_loop_of_ranks
async def test_signals_for_the_service_do_not_end_a_rank(ranks: RemoteEngine) -> None:
    for pid in children(ranks.pid):
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
    assert len(tokens(await collect(ranks, story(3)))) == 3


@in_loop_of_ranks
async def test_ranks_listen_on_loopback_alone(ranks: RemoteEngine) -> None:
    listening = {address for pid in (ranks.pid, *children(ranks.pid)) for address in listening_on(pid)}
    assert listening == {"0100007F"}  # 127.0.0.1


# -- apart -----------------------------------------------------------------------------------------------------


@in_loop_of_ranks
async def test_the_death_of_a_rank_ends_the_engine_and_is_named(ranks: RemoteEngine) -> None:
    """The last of the shared engine."""
    pids = followers_of(ranks.pid)
    assert len(pids) == RANKS - 1
    stream = ranks.generate(story())
    await anext(stream)
    os.kill(pids[-1], signal.SIGKILL)
    with pytest.raises(EngineDeadError, match=r"^rank [12] is gone \(killed by signal 9\)$"):
        await asyncio.wait_for(rest(stream), 30)
    until_gone([ranks.pid, *pids])


async def test_the_death_of_an_idle_rank_is_told_to_the_next_request(config: EngineConfig) -> None:
    """And an engine in this process gives back what it has started: another begins anew, here with steps ahead."""
    engine = await LocalEngine.start(replace(config, tensor_parallel_size=2))
    [pid] = followers_of(os.getpid())
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError, match=r"^rank 1 is gone \(killed by signal 9\)$"):
        await asyncio.wait_for(collect(engine, story()), 30)
    await engine.close()
    again = await LocalEngine.start(replace(config, tensor_parallel_size=2, lookahead=1))
    again.set_vocabulary(VOCABULARY)
    ahead = await asyncio.gather(*(collect(again, each) for each in requests()))
    await again.close()
    one = await LocalEngine.start(config)
    one.set_vocabulary(VOCABULARY)
    whole = await asyncio.gather(*(collect(one, each) for each in requests()))
    await one.close()
    assert [tokens(events) for events in ahead] == [tokens(events) for events in whole]
    assert followers_of(os.getpid()) == []


async def test_ranks_end_with_the_engine(config: EngineConfig) -> None:
    engine = await RemoteEngine.start(replace(config, tensor_parallel_size=2))
    pids = children(engine.pid)
    os.kill(engine.pid, signal.SIGKILL)
    until_gone(pids)
    await engine.close()


async def test_what_is_wrong_is_said_before_ranks_are_started(
    config: EngineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.parallel.followers, "FOLLOWER", ("/no/such/program",))
    for changes, message in (
        ({"tensor_parallel_size": 4}, "tensor_parallel_size: 4 must divide the model's 6 attention heads"),
        ({"tensor_parallel_size": 3, "max_loras": 2}, "max_loras: 2 must be 0 with a tensor_parallel_size of 3"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size: 0 must be at least 1"),
    ):
        with pytest.raises(EngineConfigError, match=f"^{message}"):
            await LocalEngine.start(replace(config, **changes))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"broken\.gguf"):
        await LocalEngine.start(replace(config, tensor_parallel_size=2, model_path=str(tmp_path / "broken.gguf")))


async def test_an_error_of_all_ranks_is_one_of_its_type(config: EngineConfig, tmp_path: Path) -> None:
    """Q8_0 has a scale for every 32 inputs; half of 96 are not whole groups."""
    model = write_gguf(tmp_path / "m.gguf", kind="Q8_0", num_key_value_heads=6)
    with pytest.raises(EngineConfigError, match=r"tensor_parallel_size: 2 cuts .*o_proj.weight every 48 inputs"):
        await LocalEngine.start(replace(config, model_path=str(model), tensor_parallel_size=2))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("raise SystemExit(3)", r"^rank 1 is gone \(exit code 3\)$"),
        ("sock.sendall(b'\\0\\0\\0\\7garbage')", "^rank 1 sent what is no message"),
        ("sock.sendall(encode(Failed('CheckpointError', 'a file has gone')))", "^rank 1: a file has gone$"),
        ("sock.sendall(encode(Failed('', 'it failed: MemoryError')))", "^rank 1: it failed: MemoryError$"),
    ],
)
async def test_a_rank_that_fails_at_the_start_is_one_clear_line(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    program = f"""
import argparse, socket
from engine.parallel.wire import encode
from engine.wire import Failed
parser = argparse.ArgumentParser()
parser.add_argument("--fd", type=int)
sock = socket.socket(fileno=parser.parse_args().fd)
sock.recv(4096)  # Start
{script}
"""
    monkeypatch.setattr(engine.parallel.followers, "FOLLOWER", (sys.executable, "-c", program))
    expected = CheckpointError if "CheckpointError" in script else EngineDeadError
    with pytest.raises(expected, match=message):
        await LocalEngine.start(replace(config, tensor_parallel_size=2))


# -- words -----------------------------------------------------------------------------------------------------


class Lost(Followers):
    """One that is lost while the ranks connect."""

    closed = False

    def _start(self, config: EngineConfig, rank: int) -> None:
        pass

    def meet(self, point: Point) -> None:
        self._lose(1, EngineDeadError("rank 1 is gone"), False)
        raise RuntimeError("the store is closed")

    def close(self) -> None:
        super().close()
        self.closed = True


def test_ranks_are_ended_where_one_is_lost_at_the_start(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    many = replace(config, tensor_parallel_size=RANKS)
    lost = Lost(many)
    monkeypatch.setattr(engine.parallel.leader, "Followers", lambda config: lost)
    with pytest.raises(EngineDeadError, match="rank 1 is gone"):
        Leader.start(many, lambda phase, done: None)
    assert lost.closed


def test_ranks_are_ended_where_the_group_cannot_be(config: EngineConfig) -> None:
    def fail() -> None:
        raise RuntimeError("the device has failed")

    lost = Lost(replace(config, tensor_parallel_size=RANKS))
    runner: Any = SimpleNamespace(info=None, eos_token_ids=())
    group: Any = SimpleNamespace(close=fail)
    leader = Leader(runner, lost, group)
    with pytest.raises(RuntimeError, match="the device has failed"):
        leader.close()
    assert lost.closed


def test_a_plan_comes_as_it_was_sent() -> None:
    init = RowInit(2, SamplingParams(logit_bias={5: float("-inf")}, seed=2**64 - 1), 2**64 - 1, [1, 2], [3], adapter=1)
    work = RowWork(2, 7, [131071, 0], [4], sample=True, targets=Targets(1, [2], 20))
    messages = [Step(StepPlan([work], [init], [0, 1], [SlotFill(0, 3)])), Start(EngineConfig(model_path="-"), 7, "/x")]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for message in messages:
            ours.sendall(encode(message))
        assert [receive_to_follower(theirs) for _ in messages] == messages
        answers = [Met(Point.LOADED), Failed("CheckpointError", "x")]
        for answer in answers:
            theirs.sendall(encode(answer))
        assert [receive_from_follower(ours) for _ in answers] == answers
        theirs.close()
        assert receive_from_follower(ours) is None


def test_the_plan_of_a_decode_is_less_than_100_bytes_for_each_row() -> None:
    work = [RowWork(row, 4000 + row, [131071], [], sample=True) for row in range(32)]
    assert len(encode(Step(StepPlan(work)))) < 32 * 100


def test_a_follower_whose_leader_is_gone_ends_at_once() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "engine.parallel.follower", f"--fd={theirs.fileno()}"]
        process = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()])
    ours.close()
    assert process.wait(30) == 0
