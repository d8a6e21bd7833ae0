"""The use case itself, over an engine whose every token a test decides and a small real text side."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from engine import FinishReason, SamplingParams
from service.errors import Code, ServiceError
from service.generation import (
    INLINE_CHARACTERS,
    MAX_COMPLETIONS,
    Delta,
    Finished,
    GenerationEvent,
    GenerationRequest,
    Generator,
    Started,
)
from service.text import sandbox
from service.text.chat import Conversation, Message
from service.text.template import TemplateChat
from tests.service.fake_engine import BOS, END, EOS, INFO, PADDING, FakeEngine, toy_text
from tests.service.fakes import Gate


def ask(prompt: str | list[int] | Conversation = "Hi", **fields: Any) -> GenerationRequest:
    sampling = SamplingParams(**{"max_tokens": 3} | fields.pop("sampling", {}))
    return GenerationRequest(request_id="r", prompt=prompt, sampling=sampling, **fields)


async def run(engine: FakeEngine, request: GenerationRequest) -> list[GenerationEvent]:
    return [event async for event in Generator(engine, toy_text()).generate(request)]


def text(events: list[GenerationEvent], index: int = 0) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta) and event.index == index)


def end(events: list[GenerationEvent]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


# -- what reaches the engine -----------------------------------------------------------------------------------------


async def test_text_begins_with_bos_where_the_tokenizer_says_so() -> None:
    for adds_bos, prompt in ((True, [BOS, *b"Hi"]), (False, [*b"Hi"])):
        engine = FakeEngine()
        async for _ in Generator(engine, toy_text(adds_bos=adds_bos)).generate(ask("Hi")):
            pass
        assert engine.requests[0].prompt_token_ids == prompt


async def test_token_ids_reach_the_engine_as_they_are() -> None:
    engine = FakeEngine()
    await run(engine, ask([END, 1, 2]))
    assert engine.requests[0].prompt_token_ids == [END, 1, 2]


async def test_a_conversation_goes_through_the_chat_template_and_its_text_stays_text() -> None:
    engine = FakeEngine()
    await run(engine, ask(Conversation(messages=(Message(role="user", content="<s>x"),))))
    assert engine.requests[0].prompt_token_ids == [BOS, *b"user:<s>x", END, BOS, *b"assistant:"]


async def test_the_ends_of_the_model_are_stop_tokens_unless_ignored() -> None:
    engine = FakeEngine()
    await run(engine, ask(sampling={"stop_token_ids": (7,)}))
    await run(engine, ask(sampling={"stop_token_ids": (7,), "ignore_eos": True}))
    assert [set(request.sampling.stop_token_ids) for request in engine.requests] == [{7, END, EOS}, {7}]


async def test_until_context_asks_for_all_the_room_there_is() -> None:
    engine = FakeEngine()
    finished = end(await run(engine, ask([1, 2, 3], until_context=True)))
    assert finished.reason is FinishReason.LENGTH
    assert finished.usage.completion_tokens == INFO.max_model_len - 3


async def test_completions_have_ids_and_seeds_of_their_own() -> None:
    engine = FakeEngine()
    await run(engine, ask(n=3, sampling={"seed": 2**64 - 1}))
    assert sorted((each.request_id, each.sampling.seed) for each in engine.requests) == [
        ("r#0", 2**64 - 1),
        ("r#1", 0),
        ("r#2", 1),
    ]


# -- what comes back -------------------------------------------------------------------------------------------------


async def test_one_started_then_deltas_then_one_finished() -> None:
    started, *deltas, finished = await run(FakeEngine(b"abc"), ask("Hi"))
    assert started == Started(request_id="r", prompt_tokens=3, cached_tokens=1, queue_seconds=0.25)
    assert [(delta.text, delta.token_ids) for delta in deltas if isinstance(delta, Delta)] == [
        ("a", [97]),
        ("b", [98]),
        ("c", [99]),
    ]
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.matched_stop) == (FinishReason.LENGTH, None)
    assert msgspec.structs.astuple(finished.usage) == (3, 3, 1)
    assert finished.queued_seconds == 0.25
    assert 0 <= finished.first_token_seconds <= finished.finished_seconds


async def test_n_completions_share_one_started_and_end_once_each() -> None:
    events = await run(FakeEngine(b"abc"), ask(n=4))
    assert isinstance(events[0], Started)
    assert sum(isinstance(event, Started) for event in events) == 1
    assert sorted(event.index for event in events if isinstance(event, Finished)) == [0, 1, 2, 3]
    assert [text(events, index) for index in range(4)] == ["abc"] * 4


async def test_of_what_comes_together_the_first_completion_comes_first() -> None:
    """So `Started` tells of the one that was queued and computed for all."""
    events = await run(FakeEngine(b"ab"), ask(n=16, sampling={"max_tokens": 2}))
    assert [event.index for event in events if isinstance(event, Delta)] == [*range(16)] * 2


async def test_deltas_are_whole_characters_and_carry_every_token() -> None:
    events = await run(FakeEngine("é🚆".encode()), ask(sampling={"max_tokens": 6}))
    deltas = [event for event in events if isinstance(event, Delta)]
    assert [delta.text for delta in deltas] == ["", "é", "", "", "", "🚆"]
    assert [token for delta in deltas for token in delta.token_ids] == list("é🚆".encode())


async def test_a_character_cut_by_the_end_becomes_a_replacement_character() -> None:
    assert text(await run(FakeEngine("é🚆".encode()), ask(sampling={"max_tokens": 4}))) == "é�"


async def test_logprobs_stand_beside_their_tokens() -> None:
    events = await run(FakeEngine(b"ab"), ask(sampling={"max_tokens": 2, "logprobs": 2}))
    logprobs = [each for event in events if isinstance(event, Delta) for each in event.logprobs]
    assert [(each.token_id, each.logprob, each.top) for each in logprobs] == [
        (97, -0.97, [(97, -0.97), (98, -1.97)]),
        (98, -0.98, [(98, -0.98), (99, -1.98)]),
    ]


async def test_logprobs_of_the_prompt_come_whole_with_started_however_the_prompt_is_cut() -> None:
    events = await run(FakeEngine(b"ab"), ask("Hey", sampling={"max_tokens": 2, "prompt_logprobs": 1}))
    started, *deltas, finished = events
    assert isinstance(started, Started)
    assert started.cached_tokens == 1  # what the first token says, not what a part of the prompt says
    assert [(each.token_id, each.logprob, each.top) for each in started.prompt_logprobs] == [
        (token, -token / 100, [(token, -token / 100)]) for token in b"Hey"
    ]
    assert [delta.text for delta in deltas if isinstance(delta, Delta)] == ["a", "b"]
    assert isinstance(finished, Finished)


async def test_n_completions_tell_the_logprobs_of_their_prompt_once() -> None:
    engine = FakeEngine()
    started, *rest = await run(engine, ask(n=3, sampling={"prompt_logprobs": 2}))
    assert isinstance(started, Started)
    assert [each.token_id for each in started.prompt_logprobs] == [*b"Hi"]
    assert not any(isinstance(event, Started) for event in rest)
    assert sorted(event.index for event in rest if isinstance(event, Finished)) == [0, 1, 2]
    assert [each.sampling.prompt_logprobs for each in engine.requests] == [2, None, None]  # computed once


async def test_ids_that_only_the_engine_has_add_no_text() -> None:
    assert text(await run(FakeEngine([97, PADDING, 98]), ask([PADDING]))) == "ab"


async def test_a_failed_generation_ends_with_an_error_and_keeps_what_it_had() -> None:
    engine = FakeEngine(b"abc")
    engine.fails_after = 2
    events = await run(engine, ask())
    assert text(events) == "ab"
    assert (end(events).reason, end(events).error) == (FinishReason.ERROR, "the logits are not numbers")


# -- several tokens in one event ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_event", [2, 3, 7, 100])
async def test_text_tokens_and_logprobs_do_not_depend_on_how_many_tokens_come_at_once(per_event: int) -> None:
    request = ask(sampling={"max_tokens": 14, "logprobs": 1, "stop_token_ids": (33,)}, n=2)
    output = "é🚆 xyz é!".encode()

    async def outcome(tokens: int) -> list[object]:
        engine = FakeEngine(output)
        engine.per_event = tokens
        events = await run(engine, request)
        deltas = [event for event in events if isinstance(event, Delta)]
        found: list[object] = []
        for index in range(2):
            mine = [delta for delta in deltas if delta.index == index]
            assert all(len(delta.token_ids) == len(delta.logprobs) for delta in mine)
            [finished] = [event for event in events if isinstance(event, Finished) and event.index == index]
            found += [
                "".join(delta.text for delta in mine),
                [token for delta in mine for token in delta.token_ids],
                [each for delta in mine for each in delta.logprobs],
                (finished.reason, finished.usage.completion_tokens, finished.matched_stop),
            ]
        return found

    assert await outcome(per_event) == await outcome(1)


@pytest.mark.parametrize("per_event", [2, 5, 8])
@pytest.mark.parametrize("include", [False, True])
async def test_tokens_behind_a_stop_string_are_dropped_from_the_event_that_completes_it(
    per_event: int, include: bool
) -> None:
    engine = FakeEngine(b"abSTOPcd")
    engine.per_event = per_event
    request = ask(stop=("STOP",), include_stop=include, sampling={"max_tokens": 8, "logprobs": 0})
    events = await run(engine, request)
    deltas = [event for event in events if isinstance(event, Delta)]
    assert text(events) == ("abSTOP" if include else "ab")
    assert [token for delta in deltas for token in delta.token_ids] == [*b"abSTOP"]
    assert [each.token_id for delta in deltas for each in delta.logprobs] == [*b"abSTOP"]
    assert (end(events).reason, end(events).matched_stop) == (FinishReason.STOP, "STOP")
    assert end(events).usage.completion_tokens == 6


async def test_tokens_before_a_failure_in_the_same_event_are_kept() -> None:
    engine = FakeEngine(b"abc")
    engine.fails_after, engine.per_event = 2, 8
    events = await run(engine, ask())
    assert text(events) == "ab"
    assert end(events).reason is FinishReason.ERROR


# -- stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("include", "kept"), [(False, "ab"), (True, "abSTOP")])
async def test_a_stop_string_ends_the_completion_and_frees_the_engine_at_once(include: bool, kept: str) -> None:
    engine = FakeEngine(b"abSTOPcd")
    events = await run(engine, ask(stop=("STOP",), include_stop=include, sampling={"max_tokens": 100}))
    assert text(events) == kept
    assert (end(events).reason, end(events).matched_stop) == (FinishReason.STOP, "STOP")
    assert end(events).usage.completion_tokens == 6
    assert (engine.cancelled, engine.produced) == (["r"], 6)


async def test_what_might_have_become_a_stop_string_is_not_lost() -> None:
    assert text(await run(FakeEngine(b"abST"), ask(stop=("STOP",), sampling={"max_tokens": 4}))) == "abST"


@pytest.mark.parametrize(("token", "wanted", "matched"), [(END, (), None), (EOS, (), None), (98, (98,), 98)])
async def test_a_stop_token_is_named_only_if_the_request_named_it(
    token: int, wanted: tuple[int, ...], matched: int | None
) -> None:
    events = await run(FakeEngine([97, token, 97]), ask(sampling={"stop_token_ids": wanted}))
    assert text(events) == "a"
    assert (end(events).reason, end(events).matched_stop) == (FinishReason.STOP, matched)


async def test_closing_the_iterator_cancels_every_completion() -> None:
    engine = FakeEngine()
    engine.gate = Gate()
    engine.gate.allow(1)
    async with aclosing(Generator(engine, toy_text()).generate(ask(n=3))) as events:
        assert isinstance(await anext(events), Started)
        await engine.until(lambda: len(engine.requests) == 3)
    assert sorted(engine.cancelled) == ["r#0", "r#1", "r#2"]


async def test_closing_the_iterator_while_one_leads_cancels_it_and_begins_no_other() -> None:
    engine = FakeEngine()
    request = ask(n=3, sampling={"prompt_logprobs": 0})
    async with aclosing(Generator(engine, toy_text()).generate(request)) as events:
        assert isinstance(await anext(events), Started)
    assert (engine.cancelled, len(engine.requests)) == (["r#0"], 1)


@pytest.mark.parametrize("n", [1, 3])
async def test_cancelling_the_reader_while_it_waits_cancels_every_completion(n: int) -> None:
    engine = FakeEngine()
    engine.gate = Gate()
    reader = asyncio.create_task(run(engine, ask(n=n)))
    await engine.until(lambda: len(engine.requests) == n)
    reader.cancel()
    await engine.until(lambda: len(engine.cancelled) == n)
    with pytest.raises(asyncio.CancelledError):
        await reader


@pytest.mark.parametrize("n", [1, 3])
async def test_a_dead_engine_is_unavailable_and_its_reason_stays_inside(n: int) -> None:
    engine = FakeEngine()
    engine.gate = Gate()
    engine.gate.allow(n)
    reader = asyncio.create_task(run(engine, ask(n=n)))
    await engine.until(lambda: engine.produced == n)
    engine.die("Segmentation fault at 0xdead")
    with pytest.raises(ServiceError) as caught:
        await reader
    assert caught.value.code is Code.UNAVAILABLE
    assert "0xdead" not in caught.value.message


# -- refusals and the event loop -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "names"),
    [
        (ask([]), ["prompt", "0 tokens"]),
        (ask([0, INFO.vocab_size]), ["prompt_token_ids[1]", "260", "259"]),
        (ask([1] * INFO.max_model_len), ["prompt", "128"]),
        (ask("x" * (INFO.max_model_len + 1)), ["prompt", "129 characters", "128 tokens"]),
        (ask("a\ud800"), ["prompt", "U+D800"]),
        (ask(Conversation(messages=(Message(role="user", content="x" * 129),))), ["messages", "129", "128"]),
        (ask(Conversation(messages=(Message(role="wizard", content="x"),))), ["messages[0].role", "wizard"]),
        (ask(n=0), ["n", "0", str(MAX_COMPLETIONS)]),
        (ask(n=MAX_COMPLETIONS + 1), ["n", str(MAX_COMPLETIONS + 1), str(MAX_COMPLETIONS)]),
        (ask(stop=("",)), ["stop[0]", "0 characters"]),
        (ask(stop=("x",) * 65), ["stop", "65", "64"]),
        (ask(sampling={"max_tokens": 0}), ["max_tokens", "0"]),
        (ask(sampling={"temperature": float("nan")}), ["temperature", "nan"]),
        (ask(sampling={"seed": 2**64}), ["seed", "2**64 - 1"]),
    ],
)
async def test_a_bad_request_is_refused_by_field_value_and_limit_before_anything_runs(
    request_: GenerationRequest, names: list[str]
) -> None:
    engine = FakeEngine()
    with pytest.raises(ServiceError) as caught:
        await run(engine, request_)
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert [name for name in names if name not in caught.value.message] == []
    assert engine.requests == []


async def test_a_base_model_refuses_chats_by_name() -> None:
    generator = Generator(FakeEngine(), toy_text(chat=False))
    with pytest.raises(ServiceError, match="no chat template"):
        await anext(generator.generate(ask(Conversation(messages=(Message(role="user", content="x"),)))))


async def test_without_a_bos_the_empty_text_is_refused() -> None:
    generator = Generator(FakeEngine(), toy_text(adds_bos=False))
    with pytest.raises(ServiceError, match="at least one token"):
        await anext(generator.generate(ask("")))


BUSY = "{% for x in range(90000) %}{% for y in range(90000) %}{% endfor %}{% endfor %}"
LONG = "{% for x in range(9) %}{{ '<' * 100000 }}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(("source", "reason"), [(BUSY, "runs longer than"), (LONG, "tokens")])
async def test_a_hostile_chat_template_fails_its_chats_and_nothing_else(
    source: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.5)
    model = toy_text()
    controls = {"<s>": BOS, "<|end|>": END}
    hostile = TemplateChat(source, controls=controls, encode=model.tokenizer.encode, variables={})
    engine = FakeEngine()
    generator = Generator(engine, dataclasses.replace(model, chat=hostile))

    async def one(prompt: str | Conversation) -> list[GenerationEvent]:
        return [event async for event in generator.generate(ask(prompt))]

    chat = Conversation(messages=(Message(role="user", content="Hi"),))
    chats = [asyncio.create_task(one(chat)) for _ in range(3)]
    assert [text(await one("Hi")) for _ in range(5)] == ["abc"] * 5
    for failed in await asyncio.gather(*chats, return_exceptions=True):
        assert isinstance(failed, ServiceError)
        assert failed.code is Code.INVALID_ARGUMENT
        assert reason in failed.message
    assert len(engine.requests) == 5


class Slow:
    """A tokenizer or chat template that encodes only after the event loop has had its turn."""

    vocab_size, eos_id = 1, None

    def __init__(self) -> None:
        self.turn = threading.Event()

    def token_bytes(self, token_id: int) -> bytes:
        return b"x" * 100

    def encode(self, prompt: object, **_: object) -> list[int]:
        assert self.turn.wait(10), "the event loop was stopped"
        return [0]


@pytest.mark.parametrize(
    "prompt", ["x" * (INLINE_CHARACTERS + 1), Conversation(messages=(Message(role="user", content="x"),))]
)
async def test_the_event_loop_runs_on_while_a_long_prompt_is_encoded(prompt: str | Conversation) -> None:
    slow: Any = Slow()
    text_side = dataclasses.replace(toy_text(), tokenizer=slow, chat=slow)
    encoding = asyncio.create_task(Generator(FakeEngine(), text_side).encode(prompt))
    await asyncio.sleep(0)  # the task begins
    slow.turn.set()
    assert await encoding == [0]
