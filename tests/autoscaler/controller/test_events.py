"""Events as an API server takes them, and no more of them than a person can read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from autoscaler.cluster.client import connect
from autoscaler.cluster.events import SERIES_SECONDS, WRITE_SECONDS, Recorder
from autoscaler.cluster.face import EVENTS, Json
from autoscaler.cluster.objects import shortened
from tests.autoscaler.controller.clock import TurnedClock
from tests.autoscaler.fake_api import FakeApi

ABOUT: Json = {
    "apiVersion": "autoscaling.nemoserve.dev/v1alpha1",
    "kind": "QueueAutoscaler",
    "metadata": {"name": "nemo", "uid": "11"},
}


class Book:
    def __init__(self, api: FakeApi, recorder: Recorder, clock: TurnedClock) -> None:
        self.api, self._recorder, self.clock = api, recorder, clock

    async def write(self, note: str, reason: str = "Partial") -> None:
        await self._recorder.record(ABOUT, reason, "Look", note, warning=True)

    @property
    def events(self) -> list[Json]:
        return sorted(self.api.list(EVENTS), key=lambda each: str(each["eventTime"]))


@pytest.fixture
async def book(tmp_path: Path) -> AsyncIterator[Book]:
    clock = TurnedClock()
    async with FakeApi(clock=clock.wall) as api, connect(str(api.kubeconfig(tmp_path)), namespace="default") as cluster:
        yield Book(api, Recorder(cluster, "operator-0", clock), clock)


async def test_an_event_says_about_what_by_whom_when_and_why(book: Book) -> None:
    await book.write("1 of 3 are silent")
    [event] = book.events
    assert event["regarding"] == {
        "apiVersion": "autoscaling.nemoserve.dev/v1alpha1",
        "kind": "QueueAutoscaler",
        "name": "nemo",
        "namespace": "default",
        "uid": "11",
    }
    told = {"type": "Warning", "reason": "Partial", "action": "Look", "note": "1 of 3 are silent"}
    by = {"reportingController": "autoscaling.nemoserve.dev/operator", "reportingInstance": "operator-0"}
    assert event == event | told | by | {"eventTime": "2025-11-26T08:00:00.000000Z"}


async def test_the_same_again_is_counted_once_a_minute(book: Book) -> None:
    for _ in range(1 + int(WRITE_SECONDS / 5)):
        await book.write("1 of 3 are silent")
        book.clock.turn(5)
    [event] = book.events
    assert event["series"] == {"count": 13, "lastObservedTime": "2025-11-26T08:01:00.000000Z"}
    assert len(book.api.writes(resource="events")) == 2


async def test_the_same_much_later_is_another_event(book: Book) -> None:
    await book.write("1 of 3 are silent")
    book.clock.turn(SERIES_SECONDS)
    await book.write("1 of 3 are silent")
    assert len(book.events) == 2


async def test_the_same_is_another_event_where_the_first_one_has_gone(book: Book) -> None:
    await book.write("1 of 3 are silent")
    [first] = book.events
    events = book.api.machinery.resource(EVENTS.group, EVENTS.plural)
    book.api.machinery.delete(events, "default", first["metadata"]["name"], {})
    for _ in range(2):
        book.clock.turn(WRITE_SECONDS)
        await book.write("1 of 3 are silent")
    [again] = book.events
    assert again["note"] == first["note"]


async def test_other_words_are_another_event(book: Book) -> None:
    await book.write("1 of 3 are silent")
    book.clock.turn(1)
    await book.write("2 of 3 are silent")
    assert [each["note"] for each in book.events] == ["1 of 3 are silent", "2 of 3 are silent"]


async def test_long_words_are_cut_at_the_bytes_that_an_api_server_takes(book: Book) -> None:
    await book.write("→" * 2000, reason=",".join(["ImagePullBackOff"] * 20))
    [event] = book.events
    assert event["reason"].startswith("ImagePullBackOff,")
    assert len(event["note"].encode()) <= 1024
    assert event["note"].startswith("→→→")
    assert shortened("→" * 10, 10) == "→→…"
    assert shortened("as it is", 8) == "as it is"
