"""A server's life over a fake engine: the real port and signals' own entry, without a process."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc

from engine import CheckpointError, Done, EngineConfig, LoadProgress
from service.host import Phase
from service.models.download import Progress
from service.models.errors import StoreError
from service.models.lock import SharedLock
from service.served import CPU_BEAT_SECONDS, CUT_OFF, LOADING_SECONDS, ServedModel
from service.server import Server
from service.text.tokenizer import TextModel
from tests.service.fake_engine import FakeEngine, toy_text
from tests.service.lives import config, health, living


async def test_a_server_answers_and_ends_with_0_when_told_to_stop(tmp_path: Path) -> None:
    async with living(config(tmp_path)) as life:
        assert await life.answer() == "abc"
        life.server.stop()
        assert await asyncio.wait_for(life.end, 10) == 0


async def test_draining_finishes_what_was_accepted_and_refuses_the_rest(tmp_path: Path) -> None:
    async with living(config(tmp_path)) as life:
        call = await life.accepted()
        watch = life.typed.WatchLoad(pb.WatchLoadRequest(interval_seconds=60))  # never ends by itself
        assert (await watch.read()).load.phase == pb.PHASE_READY
        life.server.stop()
        assert (await watch.read()).load.phase == pb.PHASE_DRAINING
        with pytest.raises(grpc.aio.AioRpcError) as refused:  # told to go away: there is no new connection either
            await life.answer()
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        assert life.engine.gate is not None
        life.engine.gate.allow(3)
        rest = [response async for response in call]
        assert rest[-1].finished.usage.completion_tokens == 3
        assert await asyncio.wait_for(life.end, 10) == 0


async def test_in_the_lame_duck_time_the_server_is_not_ready_and_takes_new_requests(tmp_path: Path) -> None:
    async with living(config(tmp_path, lame_duck=60.0, drain_timeout=60.0)) as life:
        watch = health_pb2_grpc.HealthStub(life.channel).Watch(health_pb2.HealthCheckRequest(service="nemoserve.ready"))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        life.server.stop()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await health(life.channel, "nemoserve.live")
        assert await life.answer() == "abc"
        async with grpc.aio.insecure_channel(life.address) as channel:  # a new connection
            life.channel, old = channel, life.channel
            assert await life.answer() == "abc"
            life.channel = old
        life.server.stop()
        assert await asyncio.wait_for(life.end, 10) == 0


@pytest.mark.parametrize("how", ["drain limit", "second signal"])
async def test_draining_ends_at_its_limit_or_at_a_second_signal(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with living(config(tmp_path, drain_timeout=0.2 if how == "drain limit" else 60.0)) as life:
        call = await life.accepted()
        life.server.stop()
        if how == "second signal":
            life.server.stop()
        with pytest.raises(grpc.aio.AioRpcError) as lost:
            [_ async for _ in call]
        assert (lost.value.code(), lost.value.details()) == (grpc.StatusCode.UNAVAILABLE, CUT_OFF)
        assert await asyncio.wait_for(life.end, 10) == 0
        assert len(life.engine.cancelled) == 1
    [stopped] = [record for record in caplog.records if record.message == "stopped"]
    assert stopped.lost == 1  # type: ignore[attr-defined]


async def test_a_stopping_server_says_how_many_requests_it_waits_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.server.DRAIN_LOG_SECONDS", 0.02)
    caplog.set_level(logging.INFO)
    async with living(config(tmp_path, drain_timeout=0.2)) as life:
        await life.accepted()
        life.server.stop()
        assert await asyncio.wait_for(life.end, 10) == 0
    told = [record for record in caplog.records if record.message == "draining"]
    assert len(told) > 1
    assert {record.in_flight for record in told} == {1}  # type: ignore[attr-defined]


# -- loading ---------------------------------------------------------------------------------------------------------


class Loading:
    """An engine that loads for ever, and what became of it."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.undone = False

    async def __call__(self, config: EngineConfig, progress: LoadProgress) -> FakeEngine:
        progress("read weights", Done(0.25))
        self.began.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.undone = True
        raise AssertionError("nothing sets the event")


def fail_to_read(path: Path) -> TextModel:
    raise CheckpointError(f"{path}: no tokenizer in it")


async def test_the_port_is_open_and_says_loading_while_the_model_loads(tmp_path: Path) -> None:
    probe = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = probe.sockets[0].getsockname()[1]
    probe.close()
    await probe.wait_closed()
    loading = Loading()
    server = Server(config(tmp_path, grpc_address=f"127.0.0.1:{port}"), loading, lambda path: toy_text())
    end = asyncio.create_task(server.run())
    await asyncio.wait_for(loading.began.wait(), 10)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = rpc.GenerationServiceStub(channel)
        load = (await stub.GetLoad(pb.GetLoadRequest(), timeout=10)).load
        assert (load.phase, load.progress) == (pb.PHASE_LOADING, 0.25)
        assert [await health(channel, name) for name in ("", "nemoserve.ready", "nemoserve.live")] == [
            False,
            False,
            True,
        ]
    server.stop()
    assert await asyncio.wait_for(end, 10) == 0
    assert loading.undone


async def test_a_text_side_that_cannot_be_read_ends_the_loading_of_the_engine(tmp_path: Path) -> None:
    loading = Loading()
    server = Server(config(tmp_path), loading, fail_to_read)
    with pytest.raises(CheckpointError, match="no tokenizer in it"):
        await asyncio.wait_for(server.run(), 10)
    assert loading.undone
    assert server.model.status.phase is Phase.FAILED


async def test_an_engine_that_had_started_is_closed_when_the_text_side_fails(tmp_path: Path) -> None:
    engine, started = FakeEngine(), asyncio.Event()
    loop = asyncio.get_running_loop()

    async def start_engine(config: EngineConfig, progress: LoadProgress) -> FakeEngine:
        started.set()
        return engine

    def fail_after_the_engine(path: Path) -> TextModel:
        asyncio.run_coroutine_threadsafe(started.wait(), loop).result(10)
        return fail_to_read(path)

    with pytest.raises(CheckpointError):
        await asyncio.wait_for(Server(config(tmp_path), start_engine, fail_after_the_engine).run(), 10)
    assert engine.closed


async def test_files_are_fetched_first_and_a_stop_does_not_wait_for_them(tmp_path: Path) -> None:
    began, released = threading.Event(), threading.Event()

    def fetch(progress: Progress) -> None:
        progress(50, 100)
        began.set()
        released.wait(60)

    server = Server(config(tmp_path), Loading(), lambda path: toy_text(), fetch)
    end = asyncio.create_task(server.run())
    try:
        async with asyncio.timeout(10):
            async for status in server.model.watch(0.05):
                if status.detail == "download" and status.progress:
                    break
        assert status.phase is Phase.LOADING
        assert 0.4 < status.progress < 0.5
        server.stop()
        assert await asyncio.wait_for(end, 10) == 0
        assert server.abandoned(0.0)
    finally:
        released.set()
    assert not server.abandoned(10.0)


async def test_a_stop_ends_a_download_that_goes_on_and_its_lock_is_free(tmp_path: Path) -> None:
    began, stopped = threading.Event(), threading.Event()

    def fetch(progress: Progress) -> None:
        with SharedLock(tmp_path / "toy.lock").held():
            while True:
                progress(50, 100)
                began.set()
                stopped.wait(60)

    server = Server(config(tmp_path), Loading(), lambda path: toy_text(), fetch)
    end = asyncio.create_task(server.run())
    await asyncio.to_thread(began.wait, 10)
    server.stop()
    assert await asyncio.wait_for(end, 10) == 0
    stopped.set()  # the next piece arrives
    assert not server.abandoned(5.0)
    assert (tmp_path / "toy.lock.1").read_text().startswith("free")


async def test_files_that_cannot_be_fetched_end_the_server(tmp_path: Path) -> None:
    def fetch(progress: Progress) -> None:
        raise StoreError("the server answers 404")

    with pytest.raises(StoreError, match="404"):
        await asyncio.wait_for(Server(config(tmp_path), Loading(), lambda path: toy_text(), fetch).run(), 10)


async def test_cancelling_the_server_undoes_the_loading(tmp_path: Path) -> None:
    loading = Loading()
    end = asyncio.create_task(Server(config(tmp_path), loading, lambda path: toy_text()).run())
    await asyncio.wait_for(loading.began.wait(), 10)
    end.cancel()
    with pytest.raises(asyncio.CancelledError):
        await end
    assert loading.undone


async def test_a_port_in_use_is_an_os_error_that_names_it(tmp_path: Path) -> None:
    async with living(config(tmp_path)) as life:
        with pytest.raises(OSError, match=life.address):
            await Server(config(tmp_path, grpc_address=life.address), Loading(), lambda path: toy_text()).run()


# -- the served model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [LOADING_SECONDS, CPU_BEAT_SECONDS])
async def test_live_turns_off_without_progress_or_heart_beat(limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("service.served.time.monotonic", lambda: now)
    model, engine = ServedModel("toy"), FakeEngine()

    def loading(seconds: float) -> None:
        nonlocal now
        now += seconds

    def beating(seconds: float) -> None:
        engine.heartbeat_age += seconds

    passes: Callable[[float], None] = loading
    if limit == CPU_BEAT_SECONDS:
        model.ready(engine, toy_text())
        passes = beating
    passes(limit - 1)
    assert model.alive
    passes(2)
    assert not model.alive


async def test_the_time_left_is_guessed_from_the_time_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("service.served.time.monotonic", lambda: now)
    model = ServedModel("toy")
    model.loading("read weights", Done(0.01))
    assert model.status.eta_seconds is None
    now += 30
    model.loading("read weights", Done(0.25))
    assert model.status.eta_seconds == pytest.approx(90)
