"""The engine dies, hangs, fails to start, is exchanged and unloaded; the server goes on, and nobody is left waiting."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from msgspec import structs
from nemoserve.v1 import generation_pb2 as pb

from engine import CheckpointError, EngineConfig, EngineConfigError, EngineDeadError
from service.caller import CALLER, Caller
from service.errors import Code, ServiceError
from service.host import Phase, Status
from service.served import CUT_OFF
from service.server import Server
from tests.service.admission.scene import Scene, until
from tests.service.fake_engine import BOS, toy_text
from tests.service.fakes import Gate
from tests.service.grpc.ports import refusal
from tests.service.lives import Engines, config, health, living

SOON = 0.02


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.supervisor.CHECK_SECONDS", SOON)
    monkeypatch.setattr("service.supervisor.MAX_PAUSE_SECONDS", SOON)


def ready(status: Status) -> bool:
    return status.phase is Phase.READY


async def code_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [_ async for _ in call]
    return caught.value.code()


async def test_who_waits_is_handed_on_as_soon_as_the_engine_tells_that_another_needs_no_row(tmp_path: Path) -> None:
    async with living(config(tmp_path)) as life:
        life.engine.gate = Gate()
        here = Scene(life.server.model, life.engine)
        await here.fill()
        here.ask("queued")
        await until(lambda: here.model.queue.queued == 1)
        life.engine.stats = structs.replace(life.engine.stats, blocked=1)
        await until(lambda: here.reached[-1] == "queued")
        await here.end()


# -- starting again --------------------------------------------------------------------------------------------------


async def test_a_dead_engine_fails_its_requests_and_the_next_one_serves_the_next(tmp_path: Path) -> None:
    async with living(config(tmp_path)) as life:
        call = await life.accepted()
        life.engines.gate = asyncio.Event()
        life.engine.die()
        assert await code_of(call) == grpc.StatusCode.UNAVAILABLE
        await life.until(lambda status: status.phase is Phase.LOADING)
        assert not await health(life.channel, "nemoserve.ready")
        assert await health(life.channel, "nemoserve.live")
        assert await code_of(life.ask()) == grpc.StatusCode.UNAVAILABLE
        life.engines.gate.set()
        await life.until(ready)
        assert await life.answer() == "abc"
        assert life.server.model.restarts == {"died": 1}


async def test_an_engine_without_a_heart_beat_is_killed_and_replaced(tmp_path: Path) -> None:
    async with living(config(tmp_path, engine_timeout=5.0)) as life:
        call, hung = await life.accepted(), life.engine
        statuses = life.server.model.watch(60)
        assert (await anext(statuses)).phase is Phase.READY
        hung.heartbeat_age = 6.0
        assert (await asyncio.wait_for(anext(statuses), 10)).phase is Phase.FAILED
        assert await code_of(call) == grpc.StatusCode.UNAVAILABLE
        await life.until(ready)
        assert hung.killed is not None
        assert "no heart beat for 6 s" in hung.killed
        assert await life.answer() == "abc"
        assert life.server.model.restarts == {"hung": 1}


async def test_a_late_look_at_the_heart_is_no_hang(tmp_path: Path) -> None:
    """An event loop that was held up sees an old beat once; what has arrived meanwhile is read before the next look."""
    async with living(config(tmp_path, engine_timeout=5.0)) as life:
        looks = 0

        class Beats(type(life.engine)):  # type: ignore[misc]
            @property
            def heartbeat_age(self) -> float:
                nonlocal looks
                looks += 1
                return 6.0 if looks % 3 else 0.0

            @heartbeat_age.setter
            def heartbeat_age(self, value: float) -> None:
                pass

        life.engine.__class__ = Beats
        await life.until(lambda status: looks >= 12)
        assert life.server.model.restarts == {}


@pytest.mark.parametrize("allowed", [0, 2])
async def test_an_engine_that_dies_too_often_is_lost_for_good(
    tmp_path: Path, allowed: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with living(config(tmp_path, engine_restarts=allowed)) as life:
        for _ in range(allowed + 1):
            await life.until(ready)
            life.engine.die("killed by signal 11")
            await life.until(lambda status: not ready(status))
        assert await asyncio.wait_for(life.end, 10) == 70
        assert life.server.model.restarts.total() == allowed
        assert not life.server.model.alive
    assert caplog.records[-1].message == "stopped"
    assert "the engine is lost: killed by signal 11" in caplog.records[-1].reason  # type: ignore[attr-defined]


async def test_restarts_that_are_long_ago_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.supervisor.RESTART_WINDOW_SECONDS", 0.0)
    async with living(config(tmp_path, engine_restarts=1)) as life:
        for count in range(1, 4):
            life.engine.die()
            await life.until(lambda status: not ready(status))
            await life.until(ready)
            assert life.server.model.restarts == {"died": count}


async def test_an_engine_that_does_not_come_up_is_tried_again_with_longer_pauses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.supervisor.MAX_PAUSE_SECONDS", 0.0)
    async with living(config(tmp_path, engine_restarts=4)) as life:
        known: list[Exception] = [EngineDeadError("killed by signal 9"), EngineConfigError("no memory is free")]
        life.engines.failures = [*known, RuntimeError("nobody thought of this")]
        life.engine.die()
        await life.until(lambda status: not ready(status))
        await life.until(ready)
        assert life.server.model.restarts == {"died": 1, "not_started": 3}
        assert await life.answer() == "abc"
    [unforeseen] = [record for record in caplog.records if "unforeseen" in record.message]
    assert unforeseen.exc_info


async def test_the_first_load_is_tried_again_if_the_engine_dies_but_not_if_the_model_is_wrong(tmp_path: Path) -> None:
    async with living(config(tmp_path), Engines(failures=[EngineDeadError("killed by signal 9")])) as life:
        assert life.server.model.restarts == {"not_started": 1}
    wrong = Engines(failures=[CheckpointError("broken")])
    with pytest.raises(CheckpointError):
        await asyncio.wait_for(Server(config(tmp_path), wrong, lambda path: toy_text()).run(), 10)
    assert wrong.paths == ["model.gguf"]


async def test_a_load_without_a_sign_of_life_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.served.LOADING_SECONDS", 0.1)
    silent = Engines(gate=asyncio.Event())
    server = Server(config(tmp_path, engine_restarts=1), silent, lambda path: toy_text())
    assert await asyncio.wait_for(server.run(), 10) == 70
    assert len(silent.paths) == 2


async def test_the_text_side_stays_and_adapters_come_back(tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    for name in ("kept", "gone"):
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_model.safetensors").touch()
    reads = 0

    def load_text(path: Path) -> Any:
        nonlocal reads
        reads += 1
        return toy_text()

    async with living(config(tmp_path, lora_dir=folder), load_text=load_text) as life:
        assert life.server.model.loras is not None
        await life.server.model.loras.unload("gone")
        life.engine.die()
        await life.until(lambda status: not ready(status))
        await life.until(ready)
        assert reads == 1
        assert set(life.server.model.loras.loaded) == {"kept"}
        assert life.server.model.loras.absent == {"gone": "unloaded"}


async def test_a_signal_while_the_engine_is_started_again_ends_the_server(tmp_path: Path) -> None:
    async with living(config(tmp_path)) as life:
        life.engines.gate = asyncio.Event()
        life.engine.die()
        await life.until(lambda status: status.phase is Phase.LOADING)
        life.server.stop()
        assert await asyncio.wait_for(life.end, 10) == 0


async def test_an_engine_lost_while_draining_ends_its_requests_and_the_server(tmp_path: Path) -> None:
    async with living(config(tmp_path)) as life:
        call = await life.accepted()
        life.server.stop()
        life.engine.die()
        assert await code_of(call) == grpc.StatusCode.UNAVAILABLE
        assert await asyncio.wait_for(life.end, 10) == 0


# -- the model exchanged ---------------------------------------------------------------------------------------------


def find(tmp_path: Path) -> Any:
    def found(name: str) -> EngineConfig:
        if name == "unknown":
            raise ServiceError(Code.NOT_FOUND, "not in the store")
        return EngineConfig(model_path=str(tmp_path / name))

    return found


async def test_running_requests_end_on_the_old_model_and_new_ones_wait_for_the_next(tmp_path: Path) -> None:
    async with living(config(tmp_path, model_control=True), find=find(tmp_path)) as life:
        control, old = life.server.model.control, life.engine
        assert control is not None
        running = await life.accepted()
        loading = asyncio.create_task(control.load("other"))
        await life.until(lambda status: status.phase is Phase.LOADING)
        waiting = asyncio.create_task(life.answer())
        assert old.gate is not None
        assert not old.closed
        old.gate.allow(3)
        assert [response async for response in running][-1].finished.usage.completion_tokens == 3
        await asyncio.wait_for(loading, 10)
        assert await asyncio.wait_for(waiting, 10) == "abc"
        assert life.engines.paths == ["model.gguf", "other"]
        assert (len(old.requests), len(life.engine.requests)) == (1, 1)
        assert old.closed
        assert life.server.model.restarts == {}


@pytest.mark.parametrize("failure", [CheckpointError("broken"), EngineDeadError("killed by signal 9")])
async def test_when_another_model_cannot_be_loaded_the_old_one_comes_back(
    tmp_path: Path, failure: EngineDeadError
) -> None:
    async with living(config(tmp_path, model_control=True), find=find(tmp_path)) as life:
        assert life.server.model.control is not None
        life.engines.failures = [failure]
        with pytest.raises(ServiceError) as refused:
            await life.server.model.control.load("other")
        assert refused.value.code is Code.FAILED_PRECONDITION
        await life.until(ready)
        assert life.engines.paths == ["model.gguf", "other", "model.gguf"]
        assert await life.answer() == "abc"


async def test_a_model_whose_text_side_cannot_be_read_disturbs_nobody(tmp_path: Path) -> None:
    def load_text(path: Path) -> Any:
        if path.name == "other":
            raise CheckpointError(f"{path}: no tokenizer in it")
        return toy_text()

    async with living(config(tmp_path, model_control=True), load_text=load_text, find=find(tmp_path)) as life:
        assert life.server.model.control is not None
        running = await life.accepted()
        with pytest.raises(ServiceError) as refused:
            await life.server.model.control.load("other")
        assert refused.value.message == "other: no tokenizer in it"
        assert life.server.model.status.phase is Phase.READY
        assert life.engine.gate is not None
        life.engine.gate.allow(3)
        assert len([response async for response in running]) > 0
        assert len(life.engines.started) == 1


async def test_an_unloaded_model_refuses_requests_until_it_is_loaded_again(tmp_path: Path) -> None:
    async with living(config(tmp_path, model_control=True)) as life:
        control = life.server.model.control
        assert control is not None
        running = await life.accepted()
        unloading = asyncio.create_task(control.unload())
        await life.until(lambda status: status.phase is Phase.UNLOADED)
        assert await code_of(life.ask()) == grpc.StatusCode.UNAVAILABLE
        assert life.engine.gate is not None
        life.engine.gate.allow(3)
        assert [response async for response in running][-1].HasField("finished")
        await asyncio.wait_for(unloading, 10)
        assert life.engine.closed
        assert await health(life.channel, "nemoserve.live")
        assert not await health(life.channel, "nemoserve.ready")
        load = (await life.typed.GetLoad(pb.GetLoadRequest(), timeout=10)).load
        assert (load.phase, load.detail) == (pb.PHASE_UNLOADED, "unloaded")
        await control.unload()  # nothing more to do
        await control.load(None)
        assert await life.answer() == "abc"


async def test_who_waits_is_told_when_the_engine_dies_while_it_is_unloaded(tmp_path: Path) -> None:
    async with living(config(tmp_path, model_control=True)) as life:
        control = life.server.model.control
        assert control is not None
        life.engine.gate = Gate()
        asked = [asyncio.create_task(code_of(life.ask())) for _ in range(2 * life.engine.info.max_batch_size)]
        await life.until(lambda status: life.server.model.in_flight == len(asked))
        unloading = asyncio.create_task(control.unload())
        await life.until(lambda status: status.phase is Phase.UNLOADED)
        life.engine.die()
        await asyncio.wait_for(unloading, 10)
        assert set(await asyncio.wait_for(asyncio.gather(*asked), 5)) == {grpc.StatusCode.UNAVAILABLE}
        await control.load(None)
        assert await life.answer() == "abc"


@pytest.mark.parametrize("where", ["text", "engine"])
async def test_a_fault_of_ours_in_another_model_does_not_end_the_server(
    tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    fault: Any = KeyError("vocab")

    def load_text(path: Path) -> Any:
        if where == "text" and path.name == "other":
            raise fault
        return toy_text()

    async with living(config(tmp_path, model_control=True), load_text=load_text, find=find(tmp_path)) as life:
        assert life.server.model.control is not None
        life.engines.failures = [fault] if where == "engine" else []
        with pytest.raises(ServiceError) as refused:
            await asyncio.wait_for(life.server.model.control.load("other"), 10)
        assert (refused.value.code, refused.value.message) == (Code.INTERNAL, "internal error; the log has the rest")
        await life.until(ready)
        assert await life.answer() == "abc"
    [told] = [record for record in caplog.records if record.message == "model not loaded"]
    assert told.exc_info is not None


async def test_a_load_that_nobody_waits_for_any_more_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    async with living(config(tmp_path, model_control=True)) as life:
        control = life.server.model.control
        assert control is not None
        running = await life.accepted()
        loading = asyncio.create_task(control.load(None))
        await life.until(lambda status: status.phase is Phase.LOADING)
        waiting = asyncio.create_task(life.answer())
        loading.cancel()
        await life.until(ready)
        assert life.engine.gate is not None
        life.engine.gate.allow(6)
        assert [response async for response in running][-1].HasField("finished")
        assert await asyncio.wait_for(waiting, 10) == "abc"
        assert len(life.engines.started) == 1


@pytest.mark.parametrize("how", ["dies", "hangs"])
async def test_an_engine_that_is_lost_before_it_is_exchanged_keeps_nobody_waiting(tmp_path: Path, how: str) -> None:
    async with living(config(tmp_path, model_control=True, engine_timeout=5.0)) as life:
        assert life.server.model.control is not None
        running = await life.accepted()
        loading = asyncio.create_task(life.server.model.control.load(None))
        await life.until(lambda status: status.phase is Phase.LOADING)
        if how == "dies":
            life.engine.die()
            await asyncio.wait_for(loading, 10)
        else:
            life.engine.heartbeat_age = 6.0
            with pytest.raises(ServiceError, match="does not answer"):
                await asyncio.wait_for(loading, 10)
            await life.until(lambda status: bool(life.server.model.restarts) and ready(status))
        assert await code_of(running) == grpc.StatusCode.UNAVAILABLE
        assert await life.answer() == "abc"
        assert len(life.engines.started) == 2


@pytest.mark.parametrize(
    ("model", "admin", "code"), [("unknown", True, Code.NOT_FOUND), (None, False, Code.PERMISSION_DENIED)]
)
async def test_who_may_not_and_what_is_not_there_is_refused(
    tmp_path: Path, model: str | None, admin: bool, code: Code
) -> None:
    async with living(config(tmp_path, model_control=True), find=find(tmp_path)) as life:
        assert life.server.model.control is not None
        CALLER.set(replace(Caller(), admin=admin))
        with pytest.raises(ServiceError) as refused:
            await life.server.model.control.load(model)
        assert refused.value.code is code


async def test_a_signal_while_the_model_is_exchanged_drains_too(tmp_path: Path) -> None:
    async with living(config(tmp_path, model_control=True, drain_timeout=0.3)) as life:
        assert life.server.model.control is not None
        running = await life.accepted()
        loading = asyncio.create_task(life.server.model.control.load(None))
        await life.until(lambda status: status.phase is Phase.LOADING)
        waiting = life.ask()
        await life.until(lambda status: life.server.model.in_flight == 2)
        life.server.stop()
        assert await code_of(running) == grpc.StatusCode.UNAVAILABLE
        assert await code_of(waiting) == grpc.StatusCode.UNAVAILABLE
        assert await asyncio.wait_for(life.end, 10) == 0
        loading.cancel()


async def test_requests_that_wait_or_have_no_token_yet_are_kept_for_the_next_engine(tmp_path: Path) -> None:
    async with living(config(tmp_path)) as life:
        started, dead = await life.accepted(), life.engine
        asked = [asyncio.create_task(life.answer()) for _ in range(2 * dead.info.max_batch_size)]
        await life.until(lambda status: life.server.model.in_flight == 1 + len(asked))
        assert life.server.model.queue.queued > 0
        dead.die()
        assert await code_of(started) == grpc.StatusCode.UNAVAILABLE
        assert set(await asyncio.wait_for(asyncio.gather(*asked), 10)) == {"abc"}
        assert len(life.engine.requests) == len(asked)


async def test_requests_that_wait_are_told_when_the_engine_is_lost_for_good(tmp_path: Path) -> None:
    async with living(config(tmp_path, engine_restarts=0)) as life:
        await life.accepted()
        asked = [asyncio.create_task(code_of(life.ask())) for _ in range(2 * life.engine.info.max_batch_size)]
        await life.until(lambda status: life.server.model.in_flight == 1 + len(asked))
        life.engine.die()
        assert set(await asyncio.wait_for(asyncio.gather(*asked), 10)) == {grpc.StatusCode.UNAVAILABLE}
        assert await asyncio.wait_for(life.end, 10) == 70


async def test_requests_that_wait_while_another_model_is_loaded_get_its_tokens(tmp_path: Path) -> None:
    texts = {"model.gguf": toy_text(), "other": toy_text(adds_bos=False)}
    async with living(
        config(tmp_path, model_control=True), load_text=lambda path: texts[path.name], find=find(tmp_path)
    ) as life:
        assert life.server.model.control is not None
        old = life.engine
        old.gate = Gate()
        asked = [asyncio.create_task(life.answer()) for _ in range(2 * old.info.max_batch_size)]
        await life.until(lambda status: life.server.model.in_flight == len(asked))
        handed = len(old.requests)
        loading = asyncio.create_task(life.server.model.control.load("other"))
        await life.until(lambda status: status.phase is Phase.LOADING)
        old.gate.allow(3 * len(asked))
        await asyncio.wait_for(loading, 10)
        assert set(await asyncio.wait_for(asyncio.gather(*asked), 10)) == {"abc"}
        assert (len(old.requests), len(life.engine.requests)) == (handed, len(asked) - handed)
        assert {tuple(request.prompt_token_ids) for request in old.requests} == {(BOS, *b"Hi")}
        assert {tuple(request.prompt_token_ids) for request in life.engine.requests} == {(*b"Hi",)}


async def test_at_the_drain_limit_those_that_wait_are_told_in_our_words(tmp_path: Path) -> None:
    async with living(config(tmp_path, drain_timeout=0.2)) as life:
        life.engine.gate = Gate()
        asked = [asyncio.create_task(refusal(life.ask())) for _ in range(2 * life.engine.info.max_batch_size)]
        await life.until(lambda status: life.server.model.in_flight == len(asked))
        life.server.stop()
        errors = await asyncio.wait_for(asyncio.gather(*asked), 10)
        assert {(error.code(), error.details()) for error in errors} == {(grpc.StatusCode.UNAVAILABLE, CUT_OFF)}
        assert await asyncio.wait_for(life.end, 10) == 0
