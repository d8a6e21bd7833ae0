"""A short soak; `make soak` is the long one. And that a soak tells what is wrong, for each thing that could be."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from bench import soak as module
from bench.soak import Soak, soak, soak_config, write_tiny
from engine.loop import Cancel, Command
from engine.remote import RemoteEngine


async def short(folder: Path, requests: int, every: int) -> Soak:
    return await soak(soak_config(write_tiny(folder)), requests=requests, every=every, callers=24, seed=0)


async def test_hundreds_of_requests_leave_nothing_behind(tmp_path: Path) -> None:
    result = await short(tmp_path, requests=400, every=200)
    assert result.faults == []
    assert [sample.requests for sample in result.samples] == [200, 400]
    assert sum(result.ended.values()) == 400
    assert min(result.ended[reason] for reason in ("stop", "length", "cancelled")) > 0
    stats = result.samples[-1].stats
    assert min(stats.preemptions, stats.prefix_cache_hit_tokens, stats.accepted_draft_tokens) > 0


async def test_a_cancellation_that_is_lost_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the requests run on, behind the backs of their callers."""

    def send(engine: RemoteEngine, command: Command) -> None:
        if not isinstance(command, Cancel):
            engine._worker.send(command)

    monkeypatch.setattr(RemoteEngine, "_send", send)
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.0)
    assert any("terminal events" in fault for fault in (await short(tmp_path, requests=60, every=60)).faults)


async def test_memory_that_grows_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = itertools.count(0, module.GROWTH_BYTES)  # of the engine, of the client, of the engine again, …
    monkeypatch.setattr(module, "anonymous_bytes", lambda pid=None: next(sizes))
    faults = (await short(tmp_path, requests=30, every=10)).faults
    assert [fault.partition(" has grown")[0] for fault in faults] == ["the engine", "the client"]
