"""The embedded model says the same with every feature on or off, token for token, in the precision it is served in.

Six engines cover every pair of features in all four ways of being on and off, and the first has all of them; the one
that they are compared with has none, and one request at a time.
"""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from engine import speculate
from engine.request import Request, SamplingParams
from engine.runner import load_runner
from tests.engine.ways import Way, config_for, tokens_of

KV_BYTES = {"bf16": 2 * 30 * 3 * 64 * 2, "fp8": 2 * 30 * 3 * (64 + 4)}  # keys and values, layers, kv heads, head_dim
CONTEXT = 144
ALONE = Way(batch=1, caching=False, shares=False)
FEATURES = ("prefix cache", "chunks", "drafts", "lookahead", "FP8 keys and values", "pre-emption")
# Rows: engines. Columns: FEATURES, of which any two differ, and are both on and both off somewhere.
ON = (
    (1, 1, 1, 1, 1, 1),
    (1, 1, 0, 0, 0, 0),
    (1, 0, 1, 0, 0, 1),
    (0, 1, 0, 1, 0, 1),
    (0, 0, 1, 0, 1, 0),
    (0, 0, 0, 1, 1, 0),
)

SYSTEM = "You answer in the words of the log, and add nothing of your own.\n"
LOG = "Monday: wind from the north-west, sea rough, visibility good.\nTuesday: wind from the north-west, sea rough, "
ASKED = (  # how a text goes on, and how its tokens are chosen
    (SYSTEM + LOG, SamplingParams(temperature=0)),
    (LOG + LOG, SamplingParams(temperature=0)),
    (SYSTEM + "What was the wind on Monday?", SamplingParams(temperature=0, repetition_penalty=1.2, logprobs=2)),
    (SYSTEM + LOG + "visibility", SamplingParams(temperature=0.7, seed=3, top_p=0.9)),
    (LOG + "sea", SamplingParams(temperature=0.3, seed=4)),
    (SYSTEM + "one, two, three, one, two, three, one, two,", SamplingParams(temperature=1.0, seed=5, top_k=20)),
)


@pytest.fixture(scope="module")
def requests(smollm2_oracle: Any) -> list[Request]:
    return [
        Request(
            request_id=str(index),
            prompt_token_ids=smollm2_oracle(text)["input_ids"],
            sampling=replace(sampling, max_tokens=24, ignore_eos=True),
        )
        for index, (text, sampling) in enumerate(ASKED)
    ]


def said(path: Path, requests: list[Request], kv: str, way: Way) -> dict[str, list[int]]:
    config = config_for(path, way, KV_BYTES[kv], CONTEXT, kv, dtype="bfloat16")
    return tokens_of(load_runner(config, lambda phase, done: None), config, requests, way)


@pytest.fixture(scope="module")
def expected(smollm2_path: Path, requests: list[Request]) -> dict[str, dict[str, list[int]]]:
    """By precision of keys and values, all features off."""
    found = {kv: said(smollm2_path, requests, kv, ALONE) for kv in KV_BYTES}
    assert found["bf16"] != found["fp8"]
    return found


@pytest.mark.parametrize("on", ON, ids=lambda on: "".join(map(str, on)))
def test_tokens_are_the_same_with_every_feature_on_or_off(
    smollm2_path: Path,
    requests: list[Request],
    expected: dict[str, dict[str, list[int]]],
    on: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(speculate, "CPU_READING", math.inf)  # drafts are made in a crowd too
    cached, chunks, drafts, lookahead, fp8, preempted = on
    way = Way(
        batch=3,
        gap=2,
        budget=32 if chunks else 512,
        pages=10 if preempted else None,
        classes=bool(preempted),
        preempts=bool(preempted),
        caching=bool(cached),
        shares=bool(cached),
        drafts=7 * drafts,
        lookahead=lookahead,
    )
    kv = "fp8" if fp8 else "bf16"
    assert said(smollm2_path, requests, kv, way) == expected[kv]


def test_any_two_features_are_met_in_all_four_ways_of_being_on_and_off() -> None:
    for one, other in combinations(range(len(FEATURES)), 2):
        assert len({(row[one], row[other]) for row in ON}) == 4, f"{FEATURES[one]}, {FEATURES[other]}"
