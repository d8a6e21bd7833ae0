"""Conversations in a terminal: history, commands, interruption, and partners near and far."""

from __future__ import annotations

import asyncio
import io
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import cast

import pytest

from engine.remote import RemoteEngine
from service.cli.talk import HELP, LocalPartner, RemotePartner, converse, say
from service.errors import Code, ServiceError, TalkError
from service.generation import GenerationEvent, GenerationRequest, Generator
from service.grpc.server import GrpcServer
from service.text.chat import Conversation, Message
from tests.service.fakes import Answer, FakeHost, Gate

ASK = [Message(role="user", content="hello")]


class Echo:
    """Answers with the number of messages that it was shown; `rude` interrupts, `wrong` cannot be answered."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []
        self.stopped = 0

    async def answer(self, messages: list[Message]) -> AsyncGenerator[str]:
        self.seen.append([message.content for message in messages])
        if messages[-1].content == "wrong":
            raise TalkError("prompt: 900 tokens must be fewer than 512")
        try:
            yield f"answer {len(messages)}"
            if messages[-1].content == "rude":
                signal.raise_signal(signal.SIGINT)
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.stopped += 1
            raise

    async def close(self) -> None: ...


def talk(*lines: str) -> tuple[Echo, str]:
    """A whole conversation; returns the partner and what the terminal showed."""
    partner, out, script = Echo(), io.StringIO(), iter(lines)

    def read() -> str:
        try:
            return next(script)
        except StopIteration:
            raise EOFError from None

    with asyncio.Runner() as runner:
        converse(runner, partner, read, out)
    return partner, out.getvalue()


def test_each_question_brings_the_conversation_so_far() -> None:
    partner, shown = talk("one", "", "  two  ")
    assert partner.seen == [["one"], ["one", "answer 1", "two"]]
    assert shown == f"{HELP}\nanswer 1\nanswer 3\n\n"


def test_reset_forgets_and_exit_ends() -> None:
    partner, _ = talk("one", "/reset", "two", "/exit", "three")
    assert partner.seen == [["one"], ["two"]]


def test_any_other_command_shows_help_and_is_not_asked() -> None:
    partner, shown = talk("/help", "/what")
    assert partner.seen == []
    assert shown.count(HELP) == 3


def test_control_c_stops_the_answer_and_the_conversation_goes_on_without_it() -> None:
    partner, shown = talk("one", "rude", "two")
    assert partner.seen[-1] == ["one", "answer 1", "two"]
    assert partner.stopped == 1
    assert "answer 3\nanswer 3" in shown


def test_a_question_that_cannot_be_answered_is_told_and_forgotten() -> None:
    partner, shown = talk("one", "wrong", "two")
    assert "900 tokens must be fewer than 512" in shown
    assert partner.seen[-1] == ["one", "answer 1", "two"]


async def test_a_question_that_the_local_engine_refuses_does_not_end_the_conversation() -> None:
    class Refusing:
        async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent]:
            raise ServiceError(Code.INVALID_ARGUMENT, "prompt: 900 tokens must be fewer than 512")
            yield

    partner = LocalPartner(cast(RemoteEngine, None), cast(Generator, Refusing()), max_tokens=None, temperature=0.0)
    with pytest.raises(TalkError, match="900 tokens must be fewer than 512"):
        await say(partner, ASK, io.StringIO())


@pytest.fixture
async def remote() -> AsyncIterator[tuple[FakeHost, Callable[..., RemotePartner]]]:
    """A server without an engine, and partners that talk to it."""
    host = FakeHost()
    server = GrpcServer(host)
    address = f"127.0.0.1:{await server.start('127.0.0.1:0')}"
    made: list[RemotePartner] = []

    def partner(model: str = "", max_tokens: int | None = None) -> RemotePartner:
        made.append(RemotePartner(address, model, max_tokens, 0.5))
        return made[-1]

    yield host, partner
    for each in made:
        await each.close()
    await server.stop(0)


async def test_a_remote_answer_streams_and_carries_the_options(
    remote: tuple[FakeHost, Callable[..., RemotePartner]],
) -> None:
    host, partner = remote
    out = io.StringIO()
    answer = await say(partner(max_tokens=3), ASK, out)
    assert out.getvalue() == answer + "\n"
    [request] = host.requests
    assert request.prompt == Conversation(messages=tuple(ASK))
    assert (request.sampling.max_tokens, request.sampling.temperature, request.until_context) == (3, 0.5, False)


async def test_a_wrong_model_name_is_one_line(remote: tuple[FakeHost, Callable[..., RemotePartner]]) -> None:
    _, partner = remote
    with pytest.raises(TalkError, match="NOT_FOUND: model: 'nobody' is not served here; served are fake"):
        await say(partner(model="nobody"), ASK, io.StringIO())


async def test_leaving_a_remote_answer_cancels_it(remote: tuple[FakeHost, Callable[..., RemotePartner]]) -> None:
    host, partner = remote
    host.answers[""] = Answer(gate=(gate := Gate()))
    gate.allow()  # and not to the end, which might come before we leave
    answer = partner().answer(ASK)
    await anext(answer)
    await answer.aclose()
    await host.until(lambda: len(host.cancelled) == 1)


async def test_an_answer_that_fails_is_one_line(remote: tuple[FakeHost, Callable[..., RemotePartner]]) -> None:
    host, partner = remote
    host.answers[""] = Answer(finished_error="logits are not numbers", error_after=1)
    with pytest.raises(TalkError, match="logits are not numbers"):
        await say(partner(), ASK, io.StringIO())
    host.answers[""] = Answer(error=ServiceError(Code.UNAVAILABLE, "the engine is down; retry later"))
    with pytest.raises(TalkError, match="UNAVAILABLE: the engine is down"):
        await say(partner(), ASK, io.StringIO())
