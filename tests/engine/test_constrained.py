"""Grammars in an engine: a random model says what was asked for, whatever else happens, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from dataclasses import replace as replaced
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from engine import speculate
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import InvalidRequestError
from engine.face import Engine
from engine.grammar import compiler
from engine.local import LocalEngine
from engine.remote import RemoteEngine
from engine.request import FinishReason, Grammar, Request, SamplingParams
from engine.runner import Runner, load_runner
from engine.sampler import Sampler
from engine.sampling import reference
from engine.sampling.draw import uniform
from engine.sampling.mask import forbid, unpack_on_device, unpack_on_host
from engine.step import RowInit
from tests.engine.fake_drafts import Foreseen, texts_of
from tests.engine.grammars import (
    EOS,
    VOCABULARY,
    WANTED,
    Passed,
    asks,
    ended,
    run_to_end,
    text_of,
)
from tests.engine.ways import Way, config_for
from tests.tiny_models import write_hf

STYLES: tuple[dict[str, object], ...] = (
    {},
    {"temperature": 1.0, "seed": 11},
    {"temperature": 0.8, "seed": 12, "top_p": 0.9, "top_k": 40},
    {"temperature": 1.3, "seed": 13, "min_p": 0.05, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    {"temperature": 1.0, "seed": 14, "min_tokens": 8, "logit_bias": {5: 4.0}},
    {"ignore_eos": True},
)
UNPACK = (unpack_on_host, unpack_on_device)
KV_BYTES = 2 * 2 * 2 * 16 * 4  # of a token of the tiny model: keys and values, layers, kv heads, head_dim, float32


@pytest.fixture(autouse=True)
def every_grammar_passes_its_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "Trial", Passed)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("tiny"), seed=8)


@pytest.fixture(scope="module")
def runner(tiny: Path) -> Runner:
    return load_runner(config_for(tiny, Way(batch=8), KV_BYTES, 160), lambda phase, done: None)


def requests() -> list[Request]:
    """All kinds of grammars in all styles, and between them requests without."""
    made = []
    for number in range(18):
        style = STYLES[number % len(STYLES)]
        wanted = list(WANTED.values())[number % 7 % 6] if number % 3 else None
        prompt = [3 + (number * 7 + i * i) % 140 for i in range(1 + number * 2)]
        made.append(asks(str(number), prompt, wanted, **({"max_tokens": 30} | style)))
    return made


REQUESTS = requests()
Said = dict[str, tuple[list[int], FinishReason | None]]


def run(runner: Runner, config: EngineConfig, asked: list[Request], way: Way) -> tuple[Said, EngineCore]:
    core = EngineCore(runner, config, clock=lambda: 0.0)
    core.set_vocabulary(VOCABULARY)
    arrivals, events, step = list(reversed(asked)) if way.backwards else list(asked), [], 0
    while arrivals or core.has_work or core.is_compiling:
        while arrivals and step >= way.gap * (len(asked) - len(arrivals)):
            core.add(arrivals.pop(0))
        events += core.admit_compiled()
        events += core.step() if core.has_work else []
        step += 1
    stats = core.stats()
    assert (stats.kv_pages_used, stats.running, stats.queued) == (0, 0, 0)
    core.check()
    core.close()
    return ended(events), core


def run_tiny(path: Path, way: Way, asked: list[Request] = REQUESTS) -> Said:
    config = config_for(path, way, KV_BYTES, max_model_len=80)
    said, core = run(load_runner(config, lambda phase, done: None), config, asked, way)
    stats = core.stats()
    assert (stats.preemptions > 0) == way.preempts
    assert (stats.accepted_draft_tokens > 0) == (way.drafts > 0)
    return said


@pytest.fixture(scope="module")
def expected(tiny: Path) -> Said:
    return run_tiny(tiny, Way(batch=1, caching=False))


# -- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WANTED)
def test_what_a_random_model_says_is_what_was_asked_for(runner: Runner, tiny: Path, name: str) -> None:
    wanted, config = WANTED[name], config_for(tiny, Way(batch=8), KV_BYTES, 160)
    styles = [style | {"seed": seed} for style in STYLES for seed in range(4)]
    asked = [
        asks(f"{at}", [7, 3 + at], wanted, **({"max_tokens": 140, "logit_bias": {ord("}") - 29: 6.0}} | style))
        for at, style in enumerate(styles)
    ]
    said, _ = run(runner, config, asked, Way())
    whole = [text_of(tokens) for tokens, reason in said.values() if reason is FinishReason.STOP]
    assert len(said) == len(asked)
    assert {reason for _, reason in said.values()} <= {FinishReason.STOP, FinishReason.LENGTH}
    assert [text for text in whole if not wanted.holds(text)] == []
    assert len(whole) >= len(asked) // 2
    assert len(set(whole)) > 1


@settings(max_examples=25, deadline=None)
@given(
    pattern=st.recursive(
        st.sampled_from(["a", "b", "[0-9]", "x?", "é"]),
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3).map("".join),
            st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
            inner.map(lambda part: f"({part}){{1,3}}"),
        ),
        max_leaves=8,
    ),
    seed=st.integers(0, 1000),
)
def test_random_expressions_are_matched(runner: Runner, tiny: Path, pattern: str, seed: int) -> None:
    grammar = Grammar(kind="regex", text=pattern)
    sampling = SamplingParams(grammar=grammar, temperature=1.5, seed=seed, max_tokens=100)
    asked = [Request(request_id="a", prompt_token_ids=[5, 6], sampling=sampling)]
    said, _ = run(runner, config_for(tiny, Way(batch=8), KV_BYTES, 160), asked, Way())
    tokens, reason = said["a"]
    assert reason is FinishReason.STOP or len(tokens) == 100
    assert reason is FinishReason.LENGTH or re.fullmatch(pattern, text_of(tokens))


SCHEMAS = st.recursive(
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": "integer", "minimum": -5, "maximum": 40},
            {"type": "string", "maxLength": 3},
            {"enum": ["a", 1, None, True]},
        ]
    ),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(
            lambda parts: {
                "type": "object",
                "properties": {f"p{number}": part for number, part in enumerate(parts)},
                "required": [f"p{number}" for number in range(0, len(parts), 2)],
                "additionalProperties": False,
            }
        ),
        inner.map(lambda part: {"type": "array", "items": part, "minItems": 1, "maxItems": 2}),
        st.tuples(inner, inner).map(lambda pair: {"anyOf": list(pair)}),
    ),
    max_leaves=5,
)


def valid(schema: dict[str, object], value: object) -> bool:
    """What the schemas here mean, and no other."""
    match schema:
        case {"anyOf": [*parts]}:
            return any(valid(part, value) for part in parts)
        case {"enum": [*values]}:
            return any(type(each) is type(value) and each == value for each in values)
        case {"type": "array"}:
            return isinstance(value, list) and 1 <= len(value) <= 2 and all(valid(schema["items"], x) for x in value)  # type: ignore[arg-type]
        case {"type": "object", "properties": dict(parts), "required": [*required]}:
            fits = isinstance(value, dict) and set(required) <= set(value) <= set(parts)
            return fits and all(valid(parts[key], each) for key, each in value.items())  # type: ignore[attr-defined]
        case {"type": "integer"}:
            return type(value) is int and -5 <= value <= 40
        case {"type": "string"}:
            return isinstance(value, str) and len(value) <= 3
        case {"type": "boolean"}:
            return isinstance(value, bool)
    return value is None


@settings(max_examples=25, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 1000))
def test_random_schemas_are_fulfilled(runner: Runner, tiny: Path, schema: dict[str, object], seed: int) -> None:
    grammar = Grammar(kind="json_schema", text=json.dumps(schema))
    sampling = SamplingParams(grammar=grammar, temperature=1.2, seed=seed, max_tokens=150)
    asked = [Request(request_id="a", prompt_token_ids=[5, 6], sampling=sampling)]
    said, _ = run(runner, config_for(tiny, Way(batch=8), KV_BYTES, 160), asked, Way())
    tokens, reason = said["a"]
    assert reason is FinishReason.STOP or len(tokens) == 150
    assert reason is FinishReason.LENGTH or valid(schema, json.loads(text_of(tokens)))


# -- whatever else happens -------------------------------------------------------------------------------------------

WAYS = {
    "in a crowd": Way(batch=8),
    "in chunks": Way(batch=4, budget=5),
    "arriving late": Way(batch=8, gap=2),
    "arriving backwards": Way(batch=3, gap=1, backwards=True),
    "pre-empted": Way(batch=8, page_size=4, pages=24, preempts=True),
    "with drafts": Way(batch=8, drafts=5),
    "with drafts, pre-empted in chunks": Way(batch=6, budget=12, page_size=4, pages=24, preempts=True, drafts=3),
}


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_tokens_do_not_depend_on_scheduling(
    tiny: Path, expected: Said, way: Way, lookahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculate, "CPU_READING", math.inf)
    texts = texts_of(REQUESTS, {name: tokens for name, (tokens, _) in expected.items()})
    monkeypatch.setattr(speculate, "PromptLookup", lambda longest: Foreseen(texts, mistakes=0.2))
    assert {reason for _, reason in expected.values()} == {FinishReason.STOP, FinishReason.LENGTH}
    assert run_tiny(tiny, replaced(way, lookahead=lookahead)) == expected


def test_neighbours_of_a_grammar_say_what_they_say_without_it(tiny: Path, expected: Said) -> None:
    plain = [request for request in REQUESTS if request.sampling.grammar is None]
    assert 0 < len(plain) < len(REQUESTS)
    alone = run_tiny(tiny, Way(batch=8), plain)
    assert alone == {request.request_id: expected[request.request_id] for request in plain}


@pytest.mark.parametrize("kind", [LocalEngine, RemoteEngine])
async def test_tokens_do_not_depend_on_the_process(
    tiny: Path, expected: Said, kind: type[LocalEngine] | type[RemoteEngine]
) -> None:
    engine: Engine = await kind.start(config_for(tiny, Way(batch=5, budget=16), KV_BYTES, max_model_len=80))

    async def collect(request: Request) -> tuple[list[int], FinishReason | None]:
        events = [event async for event in engine.generate(request)]
        return [token for event in events for token in event.token_ids], events[-1].finish_reason

    try:
        with pytest.raises(InvalidRequestError, match=r"^response_format: .* no vocabulary"):
            await collect(next(each for each in REQUESTS if each.sampling.grammar))
        engine.set_vocabulary(VOCABULARY)
        found = await asyncio.gather(*map(collect, REQUESTS))
        wrong = asks("wrong", [5], None, grammar=Grammar(kind="regex", text="("))
        with pytest.raises(InvalidRequestError, match=r"^response_format: the regex .*unclosed group"):
            await collect(wrong)
    finally:
        await engine.close()
    assert dict(zip((request.request_id for request in REQUESTS), found, strict=True)) == expected


# -- waiting for a grammar -------------------------------------------------------------------------------------------


def slow_core(runner: Runner, tiny: Path) -> EngineCore:
    core = EngineCore(runner, config_for(tiny, Way(batch=8), KV_BYTES, 160))
    core.set_vocabulary(VOCABULARY)
    return core


def test_a_request_waits_for_its_grammar_and_others_do_not(runner: Runner, tiny: Path) -> None:
    core = slow_core(runner, tiny)
    core.add(asks("waits", [5, 6, 7], WANTED["a date"]))
    core.add(asks("goes", [5, 6], None, max_tokens=3, ignore_eos=True))
    events = [event for _ in range(3) for event in core.step()]  # and nobody asks for what is compiled
    assert ended(events)["goes"][1] is FinishReason.LENGTH
    stats = core.stats()
    assert (stats.queued, stats.queued_tokens, stats.blocked, stats.running) == (1, 3, 1, 0)
    assert core.is_compiling
    core.step()  # the row of who ended is free
    assert not core.has_work
    said = ended(run_to_end(core))
    assert WANTED["a date"].holds(text_of(said["waits"][0]))
    assert core.stats().queued == 0
    core.check()
    core.close()


def test_a_request_can_be_cancelled_while_it_waits_for_its_grammar(runner: Runner, tiny: Path) -> None:
    core = slow_core(runner, tiny)
    core.add(asks("a", [5, 6, 7], WANTED["a date"]))
    event = core.cancel("a")
    assert event is not None
    assert event.finish_reason is FinishReason.CANCELLED
    assert (core.has_work, core.is_compiling) == (False, False)
    assert run_to_end(core) == []
    core.check()
    core.close()


def test_a_wrong_grammar_ends_its_request_and_no_other(runner: Runner, tiny: Path) -> None:
    core = slow_core(runner, tiny)
    core.add(asks("good", [5, 6], WANTED["a date"]))
    core.add(asks("bad", [5, 6], None, grammar=Grammar(kind="json_schema", text='{"type": 3}')))
    events = run_to_end(core)
    [refused] = [event for event in events if event.request_id == "bad"]
    assert (refused.finish_reason, refused.refused, refused.token_ids) == (FinishReason.ERROR, "response_format", [])
    assert "the json_schema cannot be served" in str(refused.error)
    assert WANTED["a date"].holds(text_of(ended(events)["good"][0]))
    core.close()


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_grammar_that_runs_into_nothing_ends_its_request_with_an_error(tiny: Path, lookahead: int) -> None:
    config = config_for(tiny, Way(batch=4, lookahead=lookahead), KV_BYTES, 80)
    grammar = Grammar(kind="regex", text="aß")  # whose last byte the vocabulary lacks
    asked = [asks("bad", [5, 6], None, grammar=grammar), asks("good", [5], WANTED["a date"])]
    core = EngineCore(load_runner(config, lambda phase, done: None), config)
    core.set_vocabulary(VOCABULARY)
    for request in asked:
        core.add(request)
    events = run_to_end(core)
    [last] = [event for event in events if event.request_id == "bad" and event.finish_reason is not None]
    assert (last.finish_reason, last.refused) == (FinishReason.ERROR, None)
    assert last.error == "response_format: no token of the vocabulary can follow"
    assert WANTED["a date"].holds(text_of(ended(events)["good"][0]))
    core.close()


def test_a_bias_against_all_that_may_come_is_an_error_of_the_request_and_no_alarm(runner: Runner, tiny: Path) -> None:
    core = slow_core(runner, tiny)
    never = {VOCABULARY.tokens.index(text): -math.inf for text in (b"a", b"ab", b"abc")}
    core.add(asks("bad", [5, 6], None, grammar=Grammar(kind="regex", text="abc"), logit_bias=never))
    [event] = [event for event in run_to_end(core) if event.finish_reason is not None]
    assert (event.finish_reason, event.error) == (
        FinishReason.ERROR,
        "response_format: logit_bias forbids all that can follow",
    )
    assert core.stats().corrupted == 0
    core.close()


def test_steps_go_on_while_a_hard_grammar_is_compiled(runner: Runner, tiny: Path) -> None:
    parts = ",".join(f'{{"const":"c{number}"}}' for number in range(3000))
    core = slow_core(runner, tiny)
    core.add(asks("hard", [5], None, grammar=Grammar(kind="json_schema", text=f'{{"anyOf":[{parts}]}}')))
    steps, longest = 0, 0.0
    while core.is_compiling:
        core.add(asks(str(steps), [5, 6], None, max_tokens=1))
        began = time.monotonic()
        core.step()
        core.admit_compiled()
        longest = max(longest, time.monotonic() - began)
        steps += 1
    assert steps > 1
    assert longest < 2
    run_to_end(core)
    core.close()


# -- the mask over the logits ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(vocab=st.integers(1, 300), rows=st.lists(st.integers(0, 3), min_size=1, max_size=6), seed=st.integers(0, 2**32))
def test_masks_of_bits_forbid_what_they_do_not_have(vocab: int, rows: list[int], seed: int) -> None:
    rows.sort()
    generator = torch.Generator().manual_seed(seed)
    width = 4 * -(-(vocab + 1) // 32)
    logits = torch.randn(len(rows), vocab, generator=generator)
    packed = torch.randint(0, 256, (len(rows), width), generator=generator, dtype=torch.uint8)
    masked = {row for row in rows if row % 2}
    masks = {row: b"".join(packed[i].numpy().tobytes() for i in range(len(rows)) if rows[i] == row) for row in masked}
    found = logits.clone()
    forbid(found, rows, masks)
    for index, row in enumerate(rows):
        for token in range(vocab):
            allowed = row not in masked or packed[index, token // 8] >> (token % 8) & 1
            assert found[index, token] == (logits[index, token] if allowed else -math.inf)
    ways = (unpack(packed.numpy().tobytes(), len(rows), vocab, logits.device) for unpack in UNPACK)
    wanted = torch.tensor([[not mask[t // 8] >> (t % 8) & 1 for t in range(vocab)] for mask in packed.tolist()])
    assert all(torch.equal(each, wanted) for each in ways)


@pytest.mark.parametrize("style", STYLES)
def test_a_masked_row_is_what_the_reference_says(style: dict[str, object]) -> None:
    """All else that a request can ask for, together with a mask; logprobs are over what is allowed."""
    vocab, allowed = 200, {3, 17, 64, 65, 127, 130, 199}
    mask = bytearray(28)
    for token in allowed:
        mask[token // 8] |= 1 << (token % 8)
    params = SamplingParams(**({"temperature": 0, "logprobs": 20} | style))  # type: ignore[arg-type]
    sampler, prompt, output = Sampler(vocab, 2, torch.device("cpu"), (EOS,)), [1, 17, 3], [64, 65, 65]
    for row in range(2):
        sampler.set_row(RowInit(row, params, 9, prompt, output))
    for seed in range(20):
        logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed)).mul(3).repeat(2, 1)
        one, free = sampler.sample(logits.clone(), [1, 0], [6, 6], {1: bytes(mask)}).result()
        sampler.set_row(RowInit(0, params, 9, prompt, output))  # as it was before
        sampler.set_row(RowInit(1, params, 9, prompt, output))
        for found, may in ((one, allowed), (free, None)):
            scores = reference.adjusted(logits[0].tolist(), params, prompt, output, (EOS,), may)
            assert found.token_id == reference.chosen(scores, params, uniform(9, 6))
            wanted = reference.logprob(scores, found.token_id, 20)
            assert found.logprob is not None
            assert found.logprob.rank == wanted.rank
            assert found.logprob.logprob == pytest.approx(wanted.logprob, abs=1e-4)
            assert [token for token, _ in found.logprob.top] == [token for token, _ in wanted.top]


def test_logprobs_of_a_token_that_must_come_say_so(runner: Runner, tiny: Path) -> None:
    core = slow_core(runner, tiny)
    core.add(asks("a", [5], WANTED["a call"], logprobs=5))
    logprobs = [each for event in run_to_end(core) for each in event.logprobs or []]
    assert (logprobs[0].logprob, logprobs[0].rank, len(logprobs[0].top)) == (0.0, 1, 1)
    core.close()


def test_n_streams_of_one_grammar_differ(runner: Runner, tiny: Path) -> None:
    config = config_for(tiny, Way(batch=8), KV_BYTES, 160)
    one = asks("0", [5, 6], WANTED["words"], temperature=1.0, seed=0, max_tokens=100)
    asked = [replace(one, request_id=str(i), sampling=replace(one.sampling, seed=i)) for i in range(8)]
    said, _ = run(runner, config, asked, Way())
    texts = [text_of(tokens) for tokens, _ in said.values()]
    assert len(set(texts)) == 8
