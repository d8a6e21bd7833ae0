"""The strongest promise of the engine: a request's tokens depend on the request alone.

Real models, with keys and values in float32 and in FP8; the same requests under every way of scheduling them: alone or
in a crowd, whole or in chunks, in any order of arrival, on large or small pages, pre-empted or not, sharing pages or
not, with drafts or without, with the next step launched before the result of the last is known or after it, in this
process or another.
"""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import replace as replaced
from pathlib import Path

import pytest
from msgspec.structs import replace

from engine import speculate
from engine.face import Engine
from engine.local import LocalEngine
from engine.remote import RemoteEngine
from engine.request import Request, SamplingParams
from engine.runner import load_runner
from tests.engine.fake_drafts import Foreseen, texts_of
from tests.engine.ways import UNSHARED, Way, config_for, tokens_of
from tests.tiny_models import write_hf

STYLES = (
    SamplingParams(temperature=0),
    SamplingParams(temperature=0, repetition_penalty=1.3, logprobs=2),
    SamplingParams(temperature=1.0, seed=11),
    SamplingParams(temperature=0.8, seed=12, top_p=0.9, top_k=40),
    SamplingParams(temperature=1.2, seed=13, min_p=0.05, presence_penalty=0.5, frequency_penalty=0.2),
)


def some_requests(vocab_size: int, count: int, longest: int, new_tokens: int, seed: int = 0) -> list[Request]:
    """Prompts of 1 to `longest` tokens, in all STYLES. They are random; two of three begin with parts of one text."""
    generator = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [generator.randrange(3, vocab_size) for _ in range(count)]

    text = tokens(longest)

    def prompt(index: int) -> list[int]:
        length = generator.randint(1, longest)
        begin = text[: max(0, length - generator.randint(1, 5))] if index % 3 else []
        return begin + tokens(length - len(begin))

    return [
        Request(
            request_id=str(index),
            prompt_token_ids=prompt(index),
            sampling=replace(STYLES[index % len(STYLES)], max_tokens=generator.randint(2, new_tokens), ignore_eos=True),
        )
        for index in range(count)
    ]


WAYS = {
    "as expected, with pages of others": Way(),
    "alone, without them": Way(batch=1, caching=False, shares=False),
    "alone": Way(batch=1),
    "in a crowd": Way(batch=8),
    "in chunks of up to 5": Way(batch=4, budget=5),
    "one token at a time": Way(batch=1, budget=1),
    "arriving late": Way(batch=8, gap=2),
    "arriving backwards": Way(batch=3, gap=1, backwards=True),
    "in classes": Way(batch=3, budget=40, gap=1, classes=True, preempts=True),
    "in classes, few pages": Way(batch=6, budget=12, page_size=4, pages=24, gap=1, classes=True, preempts=True),
    "pages of 1": Way(page_size=1),
    "pages of 7": Way(batch=8, page_size=7),
    "pages of 64": Way(batch=8, page_size=64, shares=False),  # no prompt is so long
    "pre-empted": Way(batch=8, page_size=4, pages=24, preempts=True),
    "pre-empted in chunks": Way(batch=8, budget=9, page_size=2, pages=44, gap=1, preempts=True),
    "with drafts, alone": Way(batch=1, drafts=7),
    "with drafts, in a crowd": Way(batch=8, page_size=64, shares=False, drafts=3),
    "with drafts, on pages of 1": Way(page_size=1, drafts=15),
    "with drafts, in chunks, arriving late": Way(batch=16, budget=20, gap=2, drafts=5),
    "with drafts, pre-empted": Way(batch=8, page_size=4, pages=24, preempts=True, drafts=4),
}


@pytest.fixture(autouse=True)
def drafts_always_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculate, "CPU_READING", math.inf)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("tiny"), seed=8)


# keys and values, layers, kv heads, head_dim, float32; in FP8 a byte per number and a scale
TINY_KV_BYTES = {"auto": 2 * 2 * 2 * 16 * 4, "fp8": 2 * 2 * 2 * (16 + 4)}
TINY_REQUESTS = some_requests(vocab_size=160, count=14, longest=40, new_tokens=24)


def run_tiny(path: Path, way: Way, kv: str) -> dict[str, list[int]]:
    config = config_for(path, way, TINY_KV_BYTES[kv], max_model_len=80, kv=kv)
    return tokens_of(load_runner(config, lambda phase, fraction: None), config, TINY_REQUESTS, way)


@pytest.fixture(scope="module")
def expected(tiny: Path) -> dict[str, dict[str, list[int]]]:
    """By precision of keys and values."""
    found = {kv: run_tiny(tiny, UNSHARED, kv) for kv in TINY_KV_BYTES}
    for tokens in found.values():
        assert len({tuple(each) for each in tokens.values()}) == len(tokens)  # the model is not stuck on one token
    assert found["auto"] != found["fp8"]
    return found


@pytest.mark.parametrize("kv", TINY_KV_BYTES)
@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_tokens_of_a_random_model_do_not_depend_on_scheduling(
    tiny: Path,
    expected: dict[str, dict[str, list[int]]],
    way: Way,
    lookahead: int,
    kv: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = texts_of(TINY_REQUESTS, expected[kv])
    monkeypatch.setattr(speculate, "PromptLookup", lambda longest: Foreseen(texts, mistakes=0.2))
    assert run_tiny(tiny, replaced(way, lookahead=lookahead), kv) == expected[kv]


@pytest.mark.parametrize("kv", TINY_KV_BYTES)
def test_tokens_of_a_model_with_a_window_do_not_depend_on_pages_of_others(tmp_path: Path, kv: str) -> None:
    path = write_hf(tmp_path / "windowed", seed=9, sliding_window=11)
    expected = run_tiny(path, UNSHARED, kv)
    for way in (Way(batch=8, page_size=4), WAYS["pre-empted in chunks"]):
        assert run_tiny(path, way, kv) == expected


@pytest.mark.parametrize("kind", [LocalEngine, RemoteEngine])
async def test_tokens_do_not_depend_on_the_process(
    tiny: Path, expected: dict[str, dict[str, list[int]]], kind: type[LocalEngine] | type[RemoteEngine]
) -> None:
    config = config_for(tiny, Way(batch=5, budget=16), TINY_KV_BYTES["fp8"], max_model_len=80, kv="fp8")
    engine: Engine = await kind.start(config)

    async def collect(request: Request) -> list[int]:
        return [token async for event in engine.generate(request) for token in event.token_ids]

    try:
        found = await asyncio.gather(*(collect(request) for request in TINY_REQUESTS))
    finally:
        await engine.close()
    assert dict(zip(expected["fp8"], found, strict=True)) == expected["fp8"]
