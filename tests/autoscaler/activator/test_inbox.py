"""What a client sends is neither lost nor doubled, however attempts begin and end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.activator import HoldLimits, Room
from autoscaler.activator.inbox import Inbox
from tests.autoscaler.activator.scene import until


class Client:
    """Sends a message whenever the test says so. A read that is cancelled takes its message with it, as in gRPC."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue[object] = asyncio.Queue()
        self.reads = self.lost = 0

    async def read(self) -> object:
        self.reads += 1
        try:
            return await self.sent.get()
        except asyncio.CancelledError:
            self.lost += 1
            raise


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture
def inbox(client: Client) -> Iterator[Inbox]:
    room = Room(HoldLimits(max_bytes=10, max_request_bytes=10))
    with room.enter() as held:
        made = Inbox(client.read, held)
        yield made
        made.close()
    assert room.held_bytes == 0


def send(client: Client, *messages: bytes) -> None:
    for message in messages:
        client.sent.put_nowait(message)


async def test_each_attempt_gets_all_of_it(client: Client, inbox: Inbox) -> None:
    send(client, b"a", b"b")
    client.sent.put_nowait(grpc.aio.EOF)
    for _ in range(2):
        assert [await inbox.get(number) for number in range(3)] == [b"a", b"b", None]


async def test_an_attempt_that_ends_while_it_waits_loses_nothing(client: Client, inbox: Inbox) -> None:
    send(client, b"a")
    assert await inbox.get(0) == b"a"
    waiting = asyncio.ensure_future(inbox.get(1))
    await until(lambda: client.reads == 2)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert client.lost == 0
    send(client, b"b", b"c")
    assert [await inbox.get(number) for number in range(3)] == [b"a", b"b", b"c"]


async def test_an_answer_that_starts_before_all_is_sent_anew_loses_nothing(client: Client, inbox: Inbox) -> None:
    send(client, b"a", b"b", b"c")
    assert [await inbox.get(number) for number in range(3)] == [b"a", b"b", b"c"]
    assert await inbox.get(0) == b"a"  # another attempt, which is answered after its first message
    inbox.forget()
    send(client, b"d")
    assert [await inbox.get(number) for number in range(1, 4)] == [b"b", b"c", b"d"]


async def test_one_that_outgrows_the_room_goes_on_and_cannot_be_repeated(client: Client, inbox: Inbox) -> None:
    send(client, b"1234", b"5678", b"9abc", b"def")
    assert [await inbox.get(number) for number in range(2)] == [b"1234", b"5678"]
    assert inbox.repeatable
    assert [await inbox.get(number) for number in range(2, 4)] == [b"9abc", b"def"]
    assert not inbox.repeatable


@given(st.lists(st.integers(min_value=0, max_value=5), max_size=5), st.integers(min_value=0, max_value=6))
def test_whatever_attempts_there_were_the_last_one_sends_everything_once(attempts: list[int], started: int) -> None:
    """Attempts that got so far; the last is answered after so many messages."""

    async def run() -> list[bytes | None]:
        client = Client()
        with Room().enter() as held:
            inbox = Inbox(client.read, held)
            send(client, *[b"%d" % number for number in range(6)])
            client.sent.put_nowait(grpc.aio.EOF)
            for count in attempts:
                for number in range(count):
                    await inbox.get(number)
            got = []
            for number in range(7):
                if number == started:
                    inbox.forget()
                got.append(await inbox.get(number))
            return got

    assert asyncio.run(run()) == [b"0", b"1", b"2", b"3", b"4", b"5", None]
