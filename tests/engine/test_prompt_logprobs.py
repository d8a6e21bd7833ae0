"""Logprobs of a prompt's own tokens: those of transformers however the prompt is cut, batched and pre-empted."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

import engine.sampling.prompt
from engine.core import EngineCore
from engine.request import Request, SamplingParams, TokenEvent, TokenLogprob
from engine.runner import load_runner
from engine.sampling.prompt import score_targets
from engine.step import RowWork, Targets
from tests.engine.test_invariance import TINY_KV_BYTES, WAYS, config_for
from tests.tiny_models import write_hf

TOPS = (None, 0, 3, 20)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("tiny"), seed=9)


@pytest.fixture(scope="module")
def reference(tiny: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


def check(found: list[TokenLogprob], token_ids: list[int], logprobs: Tensor, top: int, tolerance: float) -> None:
    """Compare with log probabilities float32 [n, V] of the distributions that the tokens were drawn from."""
    assert [each.token_id for each in found] == token_ids
    for each, row in zip(found, logprobs, strict=True):
        own = row[each.token_id]
        assert each.logprob == pytest.approx(own.item(), abs=tolerance)
        assert (row > own + tolerance).sum() < each.rank <= (row >= own - tolerance).sum()
        assert [value for _, value in each.top] == pytest.approx(row.topk(top).values.tolist(), abs=tolerance)
        assert [row[token].item() for token, _ in each.top] == pytest.approx([v for _, v in each.top], abs=tolerance)


@pytest.mark.parametrize("name", WAYS)
def test_they_are_those_of_transformers_whatever_else_runs(
    name: str, tiny: Path, reference: transformers.PreTrainedModel
) -> None:
    print(f"seed {(seed := random.randrange(10**6))}")
    rng, way = random.Random(seed), WAYS[name]
    requests = [
        Request(
            request_id=str(index),
            prompt_token_ids=[rng.randrange(3, 160) for _ in range(rng.choice((1, 2, rng.randint(3, 40))))],
            sampling=SamplingParams(max_tokens=rng.randint(15, 24), ignore_eos=True, prompt_logprobs=top, seed=index),
        )
        for index, top in enumerate(TOPS * 3)
    ]
    config = config_for(tiny, way, TINY_KV_BYTES["auto"], max_model_len=80)
    core = EngineCore(load_runner(config, lambda phase, done: None), config, clock=lambda: 0.0)
    for request in requests:
        core.add(request)
    events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
    ended = 0
    while ended < len(requests):
        for event in core.step():
            events[event.request_id].append(event)
            ended += event.finish_reason is not None
    for request in requests:
        prompt, top, of_it = request.prompt_token_ids, request.sampling.prompt_logprobs, events[request.request_id]
        parts = [event.prompt_logprobs or [] for event in of_it]
        if top is None:
            assert not any(parts)
            continue
        first = next(index for index, event in enumerate(of_it) if event.token_ids)
        assert not any(parts[first + 1 :])  # nothing is said twice, nor after the first token
        assert max(map(len, parts)) <= way.budget
        with torch.inference_mode():
            logprobs = reference(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        check([each for part in parts for each in part], prompt[1:], logprobs, top, tolerance=2e-4)


def test_slabs_of_rows_give_what_all_rows_at_once_give(monkeypatch: pytest.MonkeyPatch) -> None:
    print(f"seed {(seed := random.randrange(10**6))}")
    rng, vocab = random.Random(seed), 50
    logits = torch.randn(40, vocab, generator=torch.Generator().manual_seed(seed)) * 4
    work, starts, at = [], [], 0
    for row, (length, first) in enumerate(((7, 3), (5, None), (11, 1), (17, 30))):
        tokens = [rng.randrange(vocab) for _ in range(length)]
        targets = None if first is None else Targets(first + 1, [*tokens[1:], rng.randrange(vocab)], top=row)
        work.append(RowWork(row, first or 0, tokens, [], True, targets))
        starts.append(at)
        at += length
    sizes: list[int] = []

    def head(index: Tensor) -> Tensor:
        sizes.append(len(index))
        return logits[index]

    monkeypatch.setattr(engine.sampling.prompt, "LOGITS_SLAB", 4 * vocab * 6 + 3)
    scores = score_targets(work, starts, head, vocab, torch.device("cpu"))
    assert scores is not None
    found = scores.result()
    assert sizes == [6] * 5 + [5]
    assert set(found) == {0, 2, 3}
    for item, start in zip(work, starts, strict=True):
        if item.targets is not None:
            expected = logits[start : start + len(item.token_ids)].log_softmax(-1)
            check(found[item.row], item.targets.token_ids, expected, item.targets.top, tolerance=1e-5)
