"""bench.scoring: its rules on plain lists, and the scorer over the real port with an engine of known logprobs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any, TypeVar

import grpc
import pytest
from msgspec.structs import replace
from nemoserve.v1 import generation_pb2 as pb

from bench.scoring import MAX_NEW_TOKENS, Scorer, sampling_of, split, windows
from tests.service.fake_engine import BOS, INFO, FakeEngine, toy_text
from tests.service.grpc.ports import served, serving

R = TypeVar("R")


def by_word(text: str) -> list[int]:
    """One id per word, the spaces before it included, as BPE vocabularies have it."""
    words = text.replace(" ", "\0 ").split("\0")
    return [sum(word.encode()) for word in words if word]


# -- rules -------------------------------------------------------------------------------------------------------------


def test_white_space_at_the_end_of_a_context_belongs_to_the_continuation() -> None:
    for context, continuation in (("a b", " c d"), ("a b ", "c d")):
        ids, more = split(by_word, context, continuation)
        assert (ids, more) == (by_word("a b"), by_word(" c d"))


def test_a_token_across_the_border_is_cut_as_the_harness_cuts_it() -> None:
    # "a b" + "c": the vocabulary joins the last word, so the continuation has what the whole has more than the context.
    assert split(by_word, "a b", "c") == (by_word("a b"), [])
    assert split(by_word, "a b", "c d") == (by_word("a b"), by_word(" d"))


def test_windows_score_every_token_once_and_fill_the_last_context() -> None:
    ids = list(range(10))
    assert list(windows(ids, 99, 4)) == [([99], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    assert list(windows([], 99, 4)) == []


def test_windows_of_any_length_cover_the_text_and_fit() -> None:
    rng = random.Random(seed := random.randrange(10**6))
    print(f"seed {seed}")
    for _ in range(200):
        ids = [rng.randrange(1000) for _ in range(rng.randrange(60))]
        length = rng.randrange(1, 20)
        pieces = list(windows(ids, -1, length))
        assert [token for _, continuation in pieces for token in continuation] == ids
        at = 0
        for context, continuation in pieces:
            assert len(context) + len(continuation) <= length + 1
            assert context == ([-1] if at == 0 else ids[at - len(context) : at])
            at += len(continuation)


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({}, {"max_tokens": MAX_NEW_TOKENS, "temperature": 0.0}),
        ({"until": "\n", "max_gen_toks": 5}, {"max_tokens": 5, "temperature": 0.0, "stop": ["\n"]}),
        ({"until": ["a", "b"], "do_sample": False, "temperature": 0.7}, {"max_tokens": 256, "stop": ["a", "b"]}),
        ({"do_sample": True, "temperature": 0.5, "top_p": 0.25}, {"max_tokens": 256, "top_p": 0.25}),
    ],
)
def test_options_of_the_harness_become_sampling_parameters(options: dict[str, Any], sampling: dict[str, Any]) -> None:
    temperature = 0.5 if options.get("do_sample") else 0.0
    assert sampling_of(options) == pb.SamplingParameters(**sampling | {"temperature": temperature})


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"top_k": "many"}])
def test_an_unknown_option_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        sampling_of(options)


# -- over the wire -----------------------------------------------------------------------------------------------------


async def scoring(do: Callable[[Scorer], R], *, adds_bos: bool = True, **options: Any) -> tuple[R, FakeEngine]:
    """`do` with a scorer of a server whose token t has logprob -t / 100, and rank 1 if t is even. Tokens are bytes."""
    engine = FakeEngine(b"abc", info=replace(INFO, max_model_len=32))
    async with serving(served(engine, toy_text(adds_bos=adds_bos))) as port:
        return await asyncio.to_thread(lambda: do(Scorer(port.address, concurrency=3, **options))), engine


async def test_a_continuation_has_the_sum_of_its_tokens_and_is_greedy_if_all_are_likeliest() -> None:
    pairs = [("xy", "bb"), ("xy", "ab"), ("xyz ", "b"), ("xy", "")]
    scores, engine = await scoring(lambda scorer: scorer.loglikelihoods(pairs))
    expected = [(-1.96, True), (-1.95, False), (-1.30, True), (0.0, True)]  # " " is 32, a 97, b 98
    assert scores == [(pytest.approx(total), greedy) for total, greedy in expected]
    sent = sorted(request.prompt_token_ids for request in engine.requests)
    assert sent == sorted([[BOS, *b"xybb"], [BOS, *b"xyab"], [BOS, *b"xyz b"]])


async def test_an_empty_context_is_the_beginning_of_sequence() -> None:
    scores, engine = await scoring(lambda scorer: scorer.loglikelihoods([("", "bb")]))
    assert scores == [(pytest.approx(-1.96), True)]
    assert engine.requests[0].prompt_token_ids == [BOS, *b"bb"]


async def test_a_model_without_bos_needs_a_prefix_token_for_an_empty_context() -> None:
    with pytest.raises(ValueError, match="prefix_token"):
        await scoring(lambda scorer: scorer.loglikelihoods([("", "bb")]), adds_bos=False)
    _, engine = await scoring(lambda scorer: scorer.loglikelihoods([("", "bb")]), adds_bos=False, prefix_token=7)
    assert engine.requests[0].prompt_token_ids == [7, *b"bb"]


async def test_a_long_context_loses_its_beginning_and_a_long_continuation_is_refused() -> None:
    _, engine = await scoring(lambda scorer: scorer.loglikelihoods([("x" * 20 + "yz", "bb")]), max_length=4)
    assert engine.requests[0].prompt_token_ids == [*b"xyzbb"]
    with pytest.raises(ValueError, match=r"continuation: 5 tokens must be at most 4"):
        await scoring(lambda scorer: scorer.loglikelihoods([("x", "bbbbb")]), max_length=4)


async def test_the_context_of_the_server_is_used_to_its_end_and_not_beyond() -> None:
    _, engine = await scoring(lambda scorer: scorer.loglikelihoods([("x" * 30, "b")]))
    assert len(engine.requests[0].prompt_token_ids) == 31  # of 32: one token is generated
    with pytest.raises(ValueError, match="max_length: 31 must be between 1 and 30"):
        await scoring(lambda scorer: None, max_length=31)


async def test_a_whole_text_is_scored_in_windows() -> None:
    (total,), engine = await scoring(lambda scorer: scorer.rolling(["abcdefghij"]), max_length=4)
    assert total == pytest.approx(-sum(b"abcdefghij") / 100)
    assert sorted(request.prompt_token_ids for request in engine.requests) == sorted(
        [[BOS, *b"abcd"], [*b"defgh"], [*b"fghij"]]
    )


async def test_completions_end_at_their_stop_strings() -> None:
    asks = [("x", {"until": ["c"], "max_gen_toks": 9}), ("y" * 31, {"max_gen_toks": 4})]
    texts, engine = await scoring(lambda scorer: scorer.complete(asks))
    assert texts == ["ab", "abca"]
    assert max(len(request.prompt_token_ids) for request in engine.requests) == 27  # 31 less 4
    with pytest.raises(ValueError, match="max_gen_toks: 31 must be at most 30"):
        await scoring(lambda scorer: scorer.complete([("x", {"max_gen_toks": 31})]))


async def test_the_first_error_ends_the_work() -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await scoring(lambda scorer: scorer.complete([("x", {"until": ["é" * 2000], "max_gen_toks": 1})] * 50))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]


async def test_a_model_that_is_not_there_is_told_at_once() -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await scoring(lambda scorer: None, model="gpt")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]
