"""The sampling kernels against the plain description of one row."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from engine.ops.triton.sampler import choose
from engine.request import SamplingParams
from engine.sampler import Sampler
from engine.sampling import reference
from engine.sampling.device import DeviceRows
from engine.sampling.draw import mix, uniform
from engine.step import RowInit

SEED = 2**63 + 12345


def run(logits: Tensor, params: list[SamplingParams], positions: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """Rows of parameters in another order than the rows of logits, and one that is not in the batch."""
    size = len(params)
    order = torch.arange(size).flip(0)
    table = torch.full((size + 1, 4), math.nan, dtype=torch.float64)
    table[order] = torch.tensor([(p.temperature, p.top_k, p.top_p, p.min_p) for p in params], dtype=torch.float64)
    mixed = mix(SEED)
    seeds = torch.full((size + 1,), mixed - 2**64 if mixed >= 2**63 else mixed)
    return choose(logits, order, torch.tensor(positions or [*range(size)]), table, seeds)


def expected(logits: Tensor, params: list[SamplingParams]) -> list[int]:
    return [
        reference.chosen(row.tolist(), each, uniform(SEED, position))
        for position, (row, each) in enumerate(zip(logits, params, strict=True))
    ]


def random_params(rng: random.Random, vocab: int) -> SamplingParams:
    def maybe(value: float, default: float) -> float:
        return value if rng.random() < 0.5 else default

    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 0.7, 1.0, 2.5]),
        top_k=rng.choice([0, 0, 1, 5, 40, 300, vocab, 3 * vocab]),
        top_p=maybe(rng.choice([0.01, 0.3, 0.9, 0.999]), 1.0),
        min_p=maybe(rng.choice([0.001, 0.1, 1.0]), 0.0),
    )


@pytest.mark.parametrize("vocab", [50, 9000])
def test_mixed_rows_follow_the_reference(vocab: int) -> None:
    rng = random.Random(vocab)
    for scale in (0.2, 4.0):
        logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab)) * scale
        logits[::2] = logits[::2].bfloat16().float()  # with many equals
        params = [random_params(rng, vocab) for _ in logits]
        peaks, tokens = run(logits, params)
        assert torch.equal(peaks, logits.amax(-1))
        assert tokens.tolist() == expected(logits, params), params


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(top_k=50, top_p=0.95),
    ],
    ids=lambda params: f"{params.temperature} {params.top_k} {params.top_p}",
)
def test_the_vocabulary_of_nemo_follows_the_reference(params: SamplingParams) -> None:
    logits = torch.randn(1, 131072, generator=torch.Generator().manual_seed(3)) * 3
    assert run(logits, [params])[1].tolist() == expected(logits, [params])


def test_equals_at_the_cut_stay_in_order_of_ids() -> None:
    logits = torch.zeros(9, 9000)
    logits[:, [70, 4444, 5000, 8999]] = 2.0
    params = [SamplingParams(top_k=k) for k in (1, 2, 3, 4, 6)]
    params += [SamplingParams(top_p=1e-6), SamplingParams(top_k=3, top_p=0.5), SamplingParams(min_p=0.5)]
    params += [SamplingParams(top_k=4, top_p=0.75)]
    assert run(logits, params)[1].tolist() == expected(logits, params)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_of_bad_logits_fails_alone(bad: float) -> None:
    kinds = [SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(top_p=0.9)]
    params = [each for each in kinds for _ in range(2)]
    logits = torch.randn(6, 5000, generator=torch.Generator().manual_seed(2))
    healthy = run(logits.clone(), params)[1]
    if bad == -math.inf:
        logits[::2] = bad
    else:
        logits[::2, 4500] = bad
    peaks, tokens = run(logits, params)
    assert not peaks[::2].isfinite().any()
    assert peaks[1::2].isfinite().all()
    assert torch.equal(tokens[1::2], healthy[1::2])
    assert ((tokens >= 0) & (tokens < 5000)).all()


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((9, 300), -math.inf)
    logits[:, 100:200] = torch.randn(100, generator=torch.Generator().manual_seed(4))
    kinds = [SamplingParams(temperature=100.0), SamplingParams(top_p=0.999), SamplingParams(min_p=0.001)]
    tokens = run(logits, kinds * 3)[1]
    assert ((tokens >= 100) & (tokens < 200)).all()


def test_the_sampler_gives_the_same_tokens_with_the_kernels() -> None:
    """Penalties and logprobs too, rows that stand in the batch twice, and a row that another request takes."""
    vocab, device = 300, torch.device("cpu")
    kinds = [
        SamplingParams(temperature=0.0, logprobs=2),
        SamplingParams(top_p=0.8, presence_penalty=1.0),
        SamplingParams(temperature=1e-9, top_k=3),
        SamplingParams(temperature=1.3),
    ]
    plain, fast = (Sampler(vocab, 6, device, (2,)) for _ in range(2))
    fast._on_device = DeviceRows(6, device, choose)
    logits = torch.randn(3, 5, vocab, generator=torch.Generator().manual_seed(5)) * 2
    for step, scores in enumerate(logits):
        for row, params in enumerate(kinds):
            if step != 1:
                for each in (plain, fast):
                    each.set_row(
                        RowInit(row, params, seed=SEED + row + step, prompt_token_ids=[1], output_token_ids=[])
                    )
        rows, positions = [2, 0, 3, 1, 3], [step + i for i in range(5)]
        quick, slow = (each.sample(scores.clone(), rows, positions).result() for each in (fast, plain))
        assert quick == slow
