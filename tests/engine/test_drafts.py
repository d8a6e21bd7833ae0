"""Real models say the same with drafts and without: tokens, logprobs, ends; greedy or drawn, whatever is asked."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from engine import speculate
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.request import EngineStats, FinishReason, Request, SamplingParams, TokenLogprob
from engine.runner import Runner, load_runner
from engine.sampler import Sampler
from engine.speculate import DraftSource, standing
from engine.step import RowInit, RowWork
from tests.engine.fake_drafts import Foreseen
from tests.tiny_adapters import write_peft
from tests.tiny_models import model_config, write_hf

VOCAB, CONTEXT = 160, 64
GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_tokens=20)
DRAWN = SamplingParams(temperature=0.9, seed=7, ignore_eos=True, max_tokens=20)

LIGHTHOUSE = (
    "He wiped the great lens until no fingerprint was left, filled the lamp, and lit it with a single match. "
    "Then he wrote the weather into his book: wind from the north-west, moderate; sea rough; visibility good.\n"
)


@dataclass
class Said:
    """What became of one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    ends: list[tuple[FinishReason, int | None]] = field(default_factory=list)


def run(runner: Runner, config: EngineConfig, requests: list[Request]) -> tuple[dict[str, Said], EngineStats]:
    core = EngineCore(runner, config)
    if config.max_loras:
        core.add_adapter("lora", core.read_adapter("lora", config.model_path + "/lora"))
    for request in requests:
        core.add(request)
    said: dict[str, Said] = {request.request_id: Said() for request in requests}
    while core.has_work:
        for event in core.step():
            found = said[event.request_id]
            found.tokens += event.token_ids
            found.logprobs += event.logprobs or []
            if event.finish_reason is not None:
                found.ends.append((event.finish_reason, event.stop_token_id))
    return said, core.stats()


SAMPLING = {
    "greedy": GREEDY,
    "drawn": DRAWN,
    "top_p": replace(DRAWN, top_p=0.7),
    "top_k": replace(DRAWN, top_k=5, seed=1),
    "min_p": replace(DRAWN, min_p=0.1, temperature=1.5),
    "logprobs": replace(GREEDY, logprobs=3),
    "logprobs of drawn ones": replace(DRAWN, logprobs=0, top_p=0.9),
    "logit_bias": replace(GREEDY, logit_bias={5: 2.0, 9: -math.inf}),
    "logit_bias, drawn": replace(DRAWN, logit_bias={5: 3.0, 6: 3.0}),
    "penalties": replace(DRAWN, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
    "prompt_logprobs": replace(GREEDY, prompt_logprobs=1),
    "until the context is full": replace(GREEDY, max_tokens=1000),
    **{f"max_tokens {count}": replace(GREEDY, max_tokens=count) for count in range(1, 11)},
}


def configured(path: Path, drafts: int, **changes: object) -> EngineConfig:
    sizes = {"max_model_len": CONTEXT, "max_batch_size": 3, "page_size": 16, "dtype": "float32", "threads": 1}
    return EngineConfig(model_path=str(path), max_draft_tokens=drafts, **(sizes | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["plain", "windowed", "fp8 keys and values", "int8", "adapter"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    changes = {"sliding_window": 9} if request.param == "windowed" else {}
    path = write_hf(tmp_path_factory.mktemp("tiny"), seed=4, **changes)
    if request.param != "adapter":
        precision = "int8" if request.param == "int8" else "auto"
        kv = "fp8" if request.param.startswith("fp8") else "auto"
        return configured(path, 7, precision=precision, kv_precision=kv)

    write_peft(path / "lora", model_config(json.loads((path / "config.json").read_text())))
    return configured(path, 7, max_loras=1)


def some_requests(config: EngineConfig) -> list[Request]:
    """Every kind of sampling, and stop tokens at every distance, with min_tokens before and behind them."""
    generator = random.Random(2)
    prompts = [[generator.randrange(VOCAB) for _ in range(generator.randint(1, 20))] for _ in SAMPLING]
    adapter = "lora" if config.max_loras else None
    return [
        Request(request_id=name, prompt_token_ids=prompt, sampling=sampling, adapter=adapter if index % 2 else None)
        for index, ((name, sampling), prompt) in enumerate(zip(SAMPLING.items(), prompts, strict=True))
    ]


def with_stops(requests: list[Request], said: dict[str, Said]) -> list[Request]:
    """Greedy requests that end with one of their own tokens, early or late, or not before min_tokens."""
    request, tokens = requests[0], said[requests[0].request_id].tokens
    return [
        replace(
            request,
            request_id=f"stop {at}, {least}",
            sampling=replace(GREEDY, stop_token_ids=(stop,), min_tokens=least),
        )
        for at, stop in enumerate(tokens[:10])
        for least in (0, at + 2)
    ]


@pytest.mark.parametrize("mistakes", [0.0, 0.3, 1.0])
def test_drafts_change_nothing(model: EngineConfig, mistakes: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculate, "CPU_READING", math.inf)
    runner = load_runner(model, lambda phase, done: None)
    requests, without = some_requests(model), replace(model, max_draft_tokens=0)
    requests += with_stops(requests, run(runner, without, requests)[0])
    expected, stats = run(load_runner(without, lambda phase, done: None), without, requests)
    assert stats.draft_tokens == 0
    texts = [request.prompt_token_ids + expected[request.request_id].tokens for request in requests]

    def source(longest: int) -> DraftSource:
        return Foreseen(texts, mistakes)

    monkeypatch.setattr(speculate, "PromptLookup", source)
    found, stats = run(load_runner(model, lambda phase, done: None), model, requests)
    for name, said in expected.items():
        assert (found[name].tokens, found[name].ends) == (said.tokens, said.ends), name
        assert [each.token_id for each in found[name].logprobs] == [each.token_id for each in said.logprobs], name
        for one, other in zip(found[name].logprobs, said.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert (one.rank, [token for token, _ in one.top]) == (other.rank, [token for token, _ in other.top])
    assert stats.draft_tokens > 100
    assert (stats.accepted_draft_tokens == 0) == (mistakes == 1)


@pytest.mark.parametrize("sampling", [GREEDY, replace(DRAWN, temperature=0.5, top_p=0.9, logprobs=1)])
def test_the_embedded_model_repeats_a_text_in_half_the_steps_and_says_the_same(
    smollm2_path: Path, smollm2_oracle: Any, sampling: SamplingParams
) -> None:
    prompt = smollm2_oracle(LIGHTHOUSE * 3)["input_ids"]
    requests = [Request(request_id="a", prompt_token_ids=prompt, sampling=replace(sampling, max_tokens=48))]
    config = EngineConfig(model_path=str(smollm2_path), max_model_len=512, max_batch_size=1, threads=1)
    without = replace(config, max_draft_tokens=0)
    expected, plain = run(load_runner(without, lambda phase, done: None), without, requests)
    found, stats = run(load_runner(config, lambda phase, done: None), config, requests)
    assert (found["a"].tokens, found["a"].ends) == (expected["a"].tokens, expected["a"].ends)
    assert plain.steps > 48
    assert stats.steps < plain.steps / 2


def test_drawn_tokens_keep_their_distribution_though_the_likeliest_is_always_guessed() -> None:
    """Two tokens of a chain of four, drawn with a guess at the first, over many seeds: joint frequencies are those of
    the chain (chi-square of 15 degrees of freedom; a thousandth of all samples is beyond 37.7)."""
    chain = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.5, 1.0, 0.0], [1.5, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    sampler = Sampler(4, 1, torch.device("cpu"), ())
    draws, seen, accepted = 4000, Counter[tuple[int, int]](), 0
    for seed in range(draws):
        sampler.set_row(RowInit(0, SamplingParams(temperature=1.0), seed, [0], []))
        work = [RowWork(0, 0, [0, 0], [], True, drafts=1)]  # the last token is 0; what follows it is guessed to be 0
        both = sampler.sample(chain[[0, 0]].clone(), [0, 0], [1, 2]).result()
        tokens = [each.token_id for each in standing(work, both)]
        accepted += len(tokens) - 1
        if len(tokens) == 1:  # the next step computes what really came
            tokens += [each.token_id for each in sampler.sample(chain[tokens].clone(), [0], [2]).result()]
        seen[tokens[0], tokens[1]] += 1
    probability = torch.softmax(chain, -1)
    expected = {(a, b): draws * float(probability[0, a] * probability[a, b]) for a in range(4) for b in range(4)}
    assert sum((seen[pair] - count) ** 2 / count for pair, count in expected.items()) < 37.7
    assert accepted / draws == pytest.approx(float(probability[0, 0]), abs=0.03)
