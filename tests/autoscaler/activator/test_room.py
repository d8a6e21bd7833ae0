"""The room itself, with a clock in the test's hand and requests that nobody sends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from autoscaler.activator import HoldLimits, Replica, Room
from autoscaler.activator.refused import Reason, Refused
from tests.autoscaler.activator.scene import assert_nothing_is_left

ROOT = Path(__file__).resolve().parents[3]


class Requests:
    """Requests by number, and which have been handed to whom, in that order."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.handed: list[tuple[int, str]] = []
        self.answered: dict[int, asyncio.Event] = {}
        self.held: dict[int, Any] = {}
        self.tasks: list[asyncio.Task[None]] = []

    async def ask(self, *numbers: int) -> None:
        for number in numbers:
            self.answered[number] = asyncio.Event()
            self.tasks.append(asyncio.create_task(self._one(number)))
            await settle()

    async def _one(self, number: int) -> None:
        with self.room.enter() as held:
            self.held[number] = held
            await self._turn(number, held)

    async def _turn(self, number: int, held: Any) -> None:
        replica = await held.turn()
        self.handed.append((number, replica.name))
        await self.answered[number].wait()
        self.answered[number].clear()
        if held.is_started:
            return
        if held.not_before or held._window is None:
            await self._turn(number, held)
        else:
            held.started()

    async def answer(self, *numbers: int) -> None:
        for number in numbers:
            self.answered[number].set()
            await settle()

    async def refuse(self, number: int, seconds: float) -> None:
        self.held[number].refused(seconds)
        await self.answer(number)

    @property
    def order(self) -> list[int]:
        return [number for number, _ in self.handed]


async def settle() -> None:
    """All that can go on without time has gone on."""
    for _ in range(5):
        await asyncio.sleep(0)


@asynccontextmanager
async def requests(**limits: Any) -> AsyncIterator[Requests]:
    room = Room(HoldLimits(**limits))
    asked = Requests(room)
    yield asked
    for task in asked.tasks:
        task.cancel()
    await asyncio.gather(*asked.tasks, return_exceptions=True)
    assert_nothing_is_left(room)


def replica(name: str = "a", capacity: int = 1) -> Replica:
    return Replica(name, "10.0.0.1", capacity=capacity)


async def test_a_replica_is_handed_twice_what_it_runs_and_then_one_for_each_that_starts() -> None:
    async with requests() as asked:
        await asked.ask(*range(6))
        asked.room.serve([replica(capacity=2)])
        await settle()
        assert asked.order == [0, 1, 2, 3]
        assert asked.room.held_requests == 2
        await asked.answer(2)
        assert asked.order == [0, 1, 2, 3, 4]


async def test_the_emptier_replica_is_next() -> None:
    async with requests() as asked:
        await asked.ask(0, 1)
        asked.room.serve([replica("a", 2)])
        await settle()
        asked.room.serve([replica("a", 2), replica("b", 2)])
        await asked.ask(2, 3, 4)
        assert asked.handed[2:4] == [(2, "b"), (3, "b")]


async def test_one_that_was_refused_has_its_old_place_again_and_lets_others_pass_meanwhile() -> None:
    async with requests() as asked:
        asked.room.serve([replica(capacity=1)])
        await asked.ask(0, 1, 2, 3)
        await asked.refuse(0, 0.05)  # the replica takes one, as it seems
        assert asked.order == [0, 1]
        await asked.answer(1)
        assert asked.order == [0, 1, 2, 3]
        while 0 not in asked.order[1:]:
            await asked.answer(2, 3)
            await asyncio.sleep(0.01)
        assert asked.order == [0, 1, 2, 3, 0]


async def test_one_that_comes_back_is_before_those_that_came_after_it() -> None:
    async with requests() as asked:
        asked.room.serve([replica(capacity=1)])
        await asked.ask(0, 1, 2, 3)
        await asked.refuse(0, 0)  # it may come back at once, and the replica takes one, as it seems
        assert asked.order == [0, 1]
        await asked.answer(1)
        assert asked.order == [0, 1, 0, 2]


async def test_the_window_shrinks_to_what_the_replica_took_and_grows_with_its_answers() -> None:
    async with requests() as asked:
        asked.room.serve([replica(capacity=4)])
        [window] = asked.room._windows
        await asked.ask(*range(8))
        for number in range(5, 8):
            await asked.refuse(number, 60)
        assert (window.size, window.handed) == (5, 5)
        await asked.answer(0, 1)
        assert (window.size, window.handed) == (7, 3)
        await asked.answer(2, 3, 4)
        assert window.size == 8


async def test_a_replica_that_was_lost_rests_before_it_is_asked_again() -> None:
    async with requests() as asked:
        asked.room.serve([replica()])
        await asked.ask(0)
        assert asked.held[0].lost(reached=False)
        await asked.answer(0)
        assert asked.order == [0]
        asked.room.serve([replica(), replica("b")])
        await settle()
        assert asked.handed == [(0, "a"), (0, "b")]


async def test_what_is_told_anew_of_a_replica_counts_what_it_has() -> None:
    async with requests() as asked:
        asked.room.serve([replica(capacity=1)])
        await asked.ask(0, 1, 2)
        asked.room.serve([replica(capacity=1)])
        await settle()
        assert asked.order == [0, 1]
        asked.room.serve([replica(capacity=2)])
        await settle()
        assert asked.order == [0, 1, 2]


async def test_a_cancelled_request_is_handed_to_nobody() -> None:
    async with requests() as asked:
        await asked.ask(0, 1)
        asked.tasks[0].cancel()
        asked.room.serve([replica()])  # before the task has learnt of it
        await settle()
        assert asked.order == [1]
        assert asked.room.outcomes == {"cancelled": 1}


async def test_one_cancelled_in_the_moment_it_is_handed_gives_its_place_back() -> None:
    async with requests() as asked:
        await asked.ask(0)
        asked.room.serve([replica()])
        asked.tasks[0].cancel()
        await settle()
        [window] = asked.room._windows
        assert (window.handed, asked.order) == (0, [])


async def test_figures_tell_who_waits() -> None:
    now = 100.0
    room = Room(clock=lambda: now)
    with room.enter() as first:
        waiting = asyncio.create_task(first.turn())
        await settle()
        now = 107.0
        assert (room.held_requests, room.oldest_held_seconds) == (1, 7.0)
        room.serve([replica()])
        assert (room.held_requests, room.oldest_held_seconds) == (0, 0.0)
        await waiting


async def test_the_wake_comes_again_when_all_replicas_go_and_somebody_waits() -> None:
    async with requests() as asked:
        asked.room.serve([replica(capacity=1)])
        await asked.ask(0, 1, 2)
        assert not asked.room.wake.is_set()
        asked.room.serve(())
        assert asked.room.wake.is_set()


async def test_who_looks_for_changes_misses_none() -> None:
    room = Room()
    seen = room.changes
    room.progress("loading the model")  # before anybody waits
    await asyncio.wait_for(room.changed(seen, 60), 10)
    waiting = asyncio.create_task(room.changed(room.changes, 60))
    await settle()
    room.serve([replica()])
    await asyncio.wait_for(waiting, 10)


async def test_progress_is_told_in_words_and_its_end_comes_nearer() -> None:
    now = 0.0
    room = Room(clock=lambda: now)
    assert room.words == "starting a replica"
    room.progress("loading\nthe model", 20)
    now = 5.0
    assert room.words == "starting a replica, loading the model, about 15 s"
    now = 50.0
    assert room.words == "starting a replica, loading the model"
    room.serve([replica()])
    assert room.words == "starting a replica"


@pytest.mark.parametrize(("eta", "low", "high"), [(None, 10, 15), (0.0, 1, 1), (20, 20, 30), (500, 60, 60)])
async def test_hints_follow_what_is_left_of_the_start(eta: float | None, low: float, high: float) -> None:
    room = Room(HoldLimits(max_requests=1), clock=lambda: 0.0)
    room.progress("x", eta=eta)
    with room.enter():
        with pytest.raises(Refused) as refused:
            room.enter()
        assert refused.value.reason is Reason.FULL
        assert refused.value.retry_after is not None
        assert low <= refused.value.retry_after <= high


def test_the_chart_and_the_page_have_the_same_defaults() -> None:
    hold = yaml.safe_load((ROOT / "helm/nemoserve/values.yaml").read_text())["autoscaling"]["hold"]
    limits = HoldLimits()
    assert hold == {
        "requests": limits.max_requests,
        "mebibytes": limits.max_bytes / 2**20,
        "seconds": limits.hold_seconds,
    }
    page = (ROOT / "docs/scale-to-zero.md").read_text()
    assert [f"| `autoscaling.hold.{name}` | {value} |" in page for name, value in hold.items()] == [True] * 3


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_requests", 0, "max_requests: 0 must be at least 1"),
        ("max_bytes", -1, "max_bytes: -1 must be at least 1"),
        ("hold_seconds", 0, "hold_seconds: 0 must be more than 0"),
        ("hold_seconds", float("nan"), "hold_seconds: nan must be more than 0"),
        ("comment_after_seconds", -1.0, "comment_after_seconds: -1 must be at least 0"),
    ],
)
def test_limits_that_make_no_sense_are_refused_by_name(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        HoldLimits(**{field: value})
    assert str(error.value) == message
