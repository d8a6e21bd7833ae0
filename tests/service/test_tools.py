"""Tools in the use case: what is asked of the model, and the calls in its answer, which an engine plays back."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from engine import FinishReason, Grammar, SamplingParams
from service.errors import Code, ServiceError, invalid
from service.generation import Delta, Finished, GenerationEvent, GenerationRequest, Generator
from service.text.chat import Conversation, Message, Tool, ToolCall
from service.text.tools.choice import tool_use
from service.text.tools.hermes import HermesTools
from service.text.tools.mistral import MistralTools
from tests.service.fake_engine import BOS, END, INFO, FakeEngine, toy_text

ROOMY = replace(INFO, max_model_len=1024, kv_pages=128)
PLAY, STOP = Tool(name="play", parameters='{"type": "object"}'), Tool(name="stop")
CALL = b'<tool_call>{"name": "play", "arguments": {"song": "STOP </tool_call>"}}</tool_call>'
USER = Message(role="user", content="Hi")


def chat(*tools: Tool, **fields: Any) -> Conversation:
    return Conversation(messages=(USER,), tools=tools, **fields)


async def run(
    engine: FakeEngine, conversation: Conversation, *, tools: Any = None, **fields: Any
) -> list[GenerationEvent]:
    sampling = SamplingParams(**{"max_tokens": 500} | fields.pop("sampling", {}))
    request = GenerationRequest(request_id="r", prompt=conversation, sampling=sampling, **fields)
    text = toy_text() if tools is None else dataclasses.replace(toy_text(), tools=tools)
    return [event async for event in Generator(engine, text).generate(request)]


def said(events: list[GenerationEvent], index: int = 0) -> tuple[str, list[tuple[str, str]]]:
    """Text, and name and arguments of each call."""
    text, calls = "", []
    for delta in events:
        if isinstance(delta, Delta) and delta.index == index:
            text += delta.text
            for piece in delta.tool_calls:
                if piece.name:
                    calls.append((piece.name, ""))
                calls[-1] = (calls[-1][0], calls[-1][1] + piece.arguments)
    return text, calls


def end(events: list[GenerationEvent]) -> Finished:
    assert isinstance(events[-1], Finished)
    return events[-1]


PLAYED = ("play", '{"song": "STOP </tool_call>"}')


@pytest.mark.parametrize("per_event", [1, 3, 1000])
async def test_calls_come_beside_the_text_and_are_counted(per_event: int) -> None:
    engine = FakeEngine([*b"Now ", *CALL, *b"\n", *CALL, END], ROOMY)
    engine.per_event = per_event
    events = await run(engine, chat(PLAY), sampling={"logprobs": 0})
    assert said(events) == ("Now ", [PLAYED, PLAYED])
    assert (end(events).reason, end(events).tool_calls) == (FinishReason.STOP, 2)
    deltas = [event for event in events if isinstance(event, Delta)]
    tokens = sum(len(delta.token_ids) for delta in deltas)
    assert tokens == sum(len(delta.logprobs) for delta in deltas) == end(events).usage.completion_tokens
    assert tokens == len(b"Now \n") + 2 * len(CALL)


async def test_without_tools_nothing_is_taken_for_a_call() -> None:
    events = await run(FakeEngine([*CALL, END], ROOMY), chat())
    assert said(events) == (CALL.decode(), [])
    assert end(events).tool_calls == 0


async def test_a_format_that_is_not_known_leaves_calls_in_the_text() -> None:
    engine = FakeEngine([*CALL, END], ROOMY)
    model = dataclasses.replace(toy_text(), tools=None)
    request = GenerationRequest(request_id="r", prompt=chat(PLAY), sampling=SamplingParams(max_tokens=500))
    assert said([event async for event in Generator(engine, model).generate(request)]) == (CALL.decode(), [])


async def test_stop_strings_end_the_text_and_not_a_call() -> None:
    events = await run(FakeEngine([*CALL, *b" and STOP it", END], ROOMY), chat(PLAY), stop=("STOP",))
    assert said(events) == (" and ", [PLAYED])
    assert (end(events).matched_stop, end(events).tool_calls) == ("STOP", 1)


async def test_a_stop_string_does_not_reach_over_a_call() -> None:
    events = await run(FakeEngine([*b"ST", *CALL, *b"OP", END], ROOMY), chat(PLAY), stop=("STOP",))
    assert said(events) == ("STOP", [PLAYED])
    assert end(events).matched_stop is None


async def test_a_call_that_is_cut_off_has_its_arguments_up_to_there() -> None:
    events = await run(FakeEngine(CALL, ROOMY), chat(PLAY), sampling={"max_tokens": 50})
    [(name, arguments)] = said(events)[1]
    assert (name, arguments) == ("play", '{"song": ')
    assert (end(events).reason, end(events).tool_calls) == (FinishReason.LENGTH, 1)


async def test_without_parallel_calls_the_end_of_the_first_ends_the_answer() -> None:
    engine = FakeEngine([*CALL, *CALL], ROOMY)
    events = await run(engine, chat(PLAY, parallel_tool_calls=False))
    assert said(events) == ("", [PLAYED])
    assert (end(events).reason, end(events).tool_calls) == (FinishReason.STOP, 1)
    assert engine.cancelled == ["r"]
    assert engine.produced == end(events).usage.completion_tokens == len(CALL) - len("</tool_call>")


async def test_completions_make_calls_of_their_own() -> None:
    events = await run(FakeEngine([*CALL, END], ROOMY), chat(PLAY), n=3)
    assert [said(events, index) for index in range(3)] == [("", [PLAYED])] * 3
    deltas = [event for event in events if isinstance(event, Delta)]
    assert len({piece.id for delta in deltas for piece in delta.tool_calls if piece.id}) == 3


# -- what is asked of the model --------------------------------------------------------------------------------------


async def test_the_model_sees_the_tools_unless_it_must_not_call_them() -> None:
    engine = FakeEngine([*CALL, END], ROOMY)
    events = await run(engine, chat(PLAY, tool_choice="none"))
    assert said(events) == (CALL.decode(), [])
    await run(engine, chat(PLAY))
    without, shown = (bytes(i for i in request.prompt_token_ids if i < 256) for request in engine.requests)
    assert b"play" not in without
    assert b"play" in shown


async def test_where_a_token_begins_every_call_it_cannot_come_if_none_may() -> None:
    engine = FakeEngine(b"a", ROOMY)
    tools = MistralTools({"[TOOL_CALLS]": BOS}, listed=True, with_ids=False)
    await run(engine, chat(PLAY, tool_choice="none"), tools=tools, sampling={"logit_bias": {97: 1.0, BOS: 9.0}})
    await run(engine, chat(PLAY), tools=tools)
    assert [request.sampling.logit_bias for request in engine.requests] == [{97: 1.0, BOS: -math.inf}, {}]


def test_required_calls_are_demanded_by_a_grammar() -> None:
    either = tool_use(chat(PLAY, STOP, tool_choice="required"), HermesTools({}))
    named = tool_use(chat(PLAY, STOP, tool_choice="required", tool_name="stop"), HermesTools({}))
    for use, names, only_one in ((either, ("play", "stop"), False), (named, ("stop",), True)):
        assert use.grammar is not None
        assert use.grammar.kind == "lark"
        assert [name for name in ("play", "stop") if name in use.grammar.text] == list(names)
        assert (use.offered, use.only_one) == (names, only_one)


def test_what_is_wrong_with_that_grammar_is_wrong_with_the_tools() -> None:
    refused = invalid("response_format", "the lark cannot be served: Invalid type: nonsense")
    use = tool_use(chat(PLAY, tool_choice="required"), HermesTools({}))
    assert use.blamed(refused).message == "tools: the grammar of their schemas cannot be served: Invalid type: nonsense"
    assert use.blamed(refused).field == "tools"
    other = invalid("seed", "is odd")
    assert use.blamed(other) is other
    assert tool_use(chat(PLAY), HermesTools({})).blamed(refused) is refused


def test_an_answer_of_another_form_calls_no_tools() -> None:
    answer = Grammar(kind="json_object")
    assert tool_use(chat(PLAY), HermesTools({}), answer).parser() is None
    with pytest.raises(ServiceError, match="response_format"):
        tool_use(chat(PLAY, tool_choice="required"), HermesTools({}), answer)


@pytest.mark.parametrize(
    ("conversation", "names"),
    [
        (chat(PLAY, PLAY), ["tools[1].name", "'play'", "tools[0]"]),
        (chat(Tool(name="not a name")), ["tools[0].name", "64"]),
        (chat(Tool(name="x" * 65)), ["tools[0].name", "64"]),
        (chat(PLAY, Tool(name="f", parameters="[1]")), ["tools[1].parameters", "JSON object"]),
        (chat(PLAY, Tool(name="f", parameters='{"type": "string"}')), ["tools[1].parameters", "'string'"]),
        (chat(Tool(name="f", parameters='{"a": "' + "x" * 2**18 + '"}')), ["tools[0].parameters", "262144"]),
        (chat(*(Tool(name=f"f{i}") for i in range(129))), ["tools", "129", "128"]),
        (chat(tool_choice="required"), ["tool_choice", "no tools"]),
        (chat(PLAY, tool_choice="required", tool_name="stop"), ["tool_name", "'stop'"]),
        (
            Conversation(messages=(USER, Message(role="tool", content="1", tool_call_id="x"))),
            ["messages[1].role", "call"],
        ),
        (
            Conversation(
                messages=(
                    *(USER, Message(role="assistant", tool_calls=(ToolCall(id="a", name="f", arguments="{}"),))),
                    Message(role="tool", content="1", tool_call_id="b"),
                )
            ),
            ["messages[2].tool_call_id", "'b'"],
        ),
    ],
)
async def test_what_is_wrong_with_tools_is_refused_by_name(conversation: Conversation, names: list[str]) -> None:
    engine = FakeEngine(b"a", replace(ROOMY, max_model_len=2**19, kv_pages=2**16))
    with pytest.raises(ServiceError) as caught:
        await run(engine, conversation)
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert [name for name in names if name not in caught.value.message] == []
    assert engine.requests == []


async def test_the_grammar_of_required_calls_is_made_beside_the_event_loop() -> None:
    """Megabytes of schemas take a second, in which everybody else would get nothing."""

    class Noted(HermesTools):
        made_in: threading.Thread | None = None

        def grammar(self, tools: Sequence[Tool], *, only_one: bool) -> str:
            self.made_in = threading.current_thread()
            return super().grammar(tools, only_one=only_one)

    tools = Noted({})
    await run(FakeEngine(CALL, ROOMY), chat(PLAY, tool_choice="required"), tools=tools)
    assert tools.made_in not in (None, threading.current_thread())


async def test_calls_cannot_be_required_of_a_model_whose_format_is_not_known() -> None:
    model = dataclasses.replace(toy_text(), tools=None)
    request = GenerationRequest(request_id="r", prompt=chat(PLAY, tool_choice="required"))
    with pytest.raises(ServiceError, match="no format that is known"):
        await anext(Generator(FakeEngine(b"a", ROOMY), model).generate(request))
