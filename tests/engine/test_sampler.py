"""The sampler: each row as the reference says, in any batch; distributions, seeds, isolation of bad rows."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass

import msgspec
import pytest
import torch
from torch import Tensor

from engine.errors import InvalidRequestError
from engine.request import SamplingParams
from engine.sampler import Sampler
from engine.sampling import draw as drawing
from engine.sampling import reference
from engine.sampling.draw import uniform
from engine.sampling.largest import largest
from engine.sampling.order import likeliest
from engine.step import RowInit, SampledToken

EOS = (2,)
GREEDY = SamplingParams(temperature=0.0)


@dataclass
class Sequence:
    """A request as the test knows it: what the reference is asked about."""

    params: SamplingParams
    seed: int
    prompt: list[int]
    output: list[int]

    @property
    def position(self) -> int:
        return len(self.prompt) + len(self.output)

    def init(self, row: int) -> RowInit:
        return RowInit(row, self.params, self.seed, list(self.prompt), list(self.output))


def sampler(vocab: int, rows: int = 8) -> Sampler:
    return Sampler(vocab, rows, torch.device("cpu"), EOS)


def sample_one(logits: Tensor, params: SamplingParams, seed: int = 0, output: tuple[int, ...] = ()) -> SampledToken:
    """The next token of a single row with prompt [1, 1, 3]."""
    alone = sampler(len(logits))
    sequence = Sequence(params, seed, [1, 1, 3], [*output])
    alone.set_row(sequence.init(0))
    return alone.sample(logits[None].clone(), [0], [sequence.position]).result()[0]


def random_params(rng: random.Random, vocab: int) -> SamplingParams:
    """Every feature alone and with others, and often none."""

    def maybe(value: float, default: float) -> float:
        return value if rng.random() < 0.4 else default

    def ids(most: int) -> list[int]:
        return rng.sample(range(vocab), rng.randrange(most))

    return SamplingParams(
        max_tokens=100,
        min_tokens=rng.choice([0, 0, 3]),
        temperature=rng.choice([0.0, 0.3, 0.7, 1.0, 2.5]),
        top_k=rng.choice([0, 0, 1, 5, 40, vocab, 3 * vocab]),
        top_p=maybe(rng.choice([0.01, 0.3, 0.9, 0.999]), 1.0),
        min_p=maybe(rng.choice([0.001, 0.1, 1.0]), 0.0),
        repetition_penalty=maybe(rng.choice([0.5, 1.3]), 1.0),
        presence_penalty=maybe(rng.choice([-1.5, 0.7]), 0.0),
        frequency_penalty=maybe(rng.choice([-0.5, 0.6]), 0.0),
        logit_bias={token: rng.choice([-5.0, 3.5, -math.inf]) for token in ids(6)} if rng.random() < 0.3 else {},
        stop_token_ids=tuple(ids(4)),
        ignore_eos=rng.random() < 0.3,
        logprobs=rng.choice([None, None, 0, 1, 20]),
    )


def random_logits(rng: random.Random, rows: int, vocab: int) -> Tensor:
    """Flat or peaked; half of them rounded to bfloat16, so that many are equal."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    logits = torch.randn(rows, vocab, generator=generator) * rng.choice([0.2, 1.0, 4.0])
    return logits.bfloat16().float() if rng.random() < 0.5 else logits


def check(token: SampledToken, logits: Tensor, sequence: Sequence) -> None:
    """Assert that the sampler said what the reference says."""
    params = sequence.params
    scores = reference.adjusted(logits.tolist(), params, sequence.prompt, sequence.output, EOS)
    expected = reference.chosen(scores, params, uniform(sequence.seed, sequence.position))
    assert token.failed is None
    assert token.token_id == expected, params
    if params.logprobs is None:
        assert token.logprob is None
        return
    assert token.logprob is not None
    wanted = reference.logprob(scores, expected, params.logprobs)
    assert token.logprob.token_id == expected
    assert token.logprob.logprob == pytest.approx(wanted.logprob, abs=2e-5)
    assert token.logprob.rank == wanted.rank
    assert [each for each, _ in token.logprob.top] == [each for each, _ in wanted.top]
    assert [value for _, value in token.logprob.top] == pytest.approx([value for _, value in wanted.top], abs=2e-5)


# 50 is padded, 640 is not; at 640 nuclei reach beyond the candidates, made few here.
@pytest.mark.parametrize(("vocab", "rounds"), [(50, 60), (640, 40)])
def test_mixed_batches_of_random_requests_follow_the_reference(
    vocab: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "CANDIDATES", 8)
    monkeypatch.setattr(drawing, "WIDEN", 4)
    rng = random.Random(vocab)
    for _ in range(rounds):
        batch = sampler(vocab)
        rows = rng.sample(range(8), rng.randint(1, 8))
        sequences = []
        for row in rows:
            prompt, output = [rng.choices(range(vocab), k=rng.randint(low, 30)) for low in (1, 0)]
            sequences.append(Sequence(random_params(rng, vocab), rng.getrandbits(64), prompt, output))
            batch.set_row(sequences[-1].init(row))
        for _ in range(4):  # so that the sampler's own memory of what it chose is what counts
            logits = random_logits(rng, len(rows), vocab)
            positions = [sequence.position for sequence in sequences]
            sampled = batch.sample(logits.clone(), rows, positions).result()
            for token, row, row_logits, sequence in zip(sampled, rows, logits, sequences, strict=True):
                assert token.row == row
                check(token, row_logits, sequence)
                sequence.output.append(token.token_id)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(top_p=0.99),
        SamplingParams(top_k=50),
        SamplingParams(top_k=3000, top_p=0.5),
        SamplingParams(temperature=2.0, min_p=0.01),
        SamplingParams(logprobs=20),
    ],
    ids=lambda params: str({k: v for k, v in msgspec.structs.asdict(params).items() if v}),
)
def test_a_real_vocabulary_follows_the_reference(params: SamplingParams) -> None:
    vocab, rng = 49152, random.Random(1)
    for scale in (0.5, 4.0):  # nuclei of tens of thousands of tokens, and of a few
        logits = torch.randn(vocab, generator=torch.Generator().manual_seed(3)) * scale
        sequence = Sequence(params, rng.getrandbits(64), [1, 1, 3], [])
        check(sample_one(logits, params, sequence.seed), logits, sequence)


def test_ranking_is_by_logit_and_then_by_id() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 3, (5, 4096), generator=generator).float()  # hundreds of equals at every cut
    logits[0, ::7] = -0.0
    logits[1] = -math.inf
    for n in (1, 20, 100, 1000, 4096):
        expected = torch.sort(logits, stable=True, descending=True).indices[:, :n]
        assert torch.equal(likeliest(logits, n), expected)


def test_drawn_frequencies_fit_the_distribution() -> None:
    """Chi-square over 20,000 draws, below the 99.9 % quantile for 9 and 4 degrees of freedom."""
    logits = torch.tensor([0.0, 1.0, 2.0, 0.5, -1.0, 1.5, 0.2, 0.9, -0.3, 1.1])
    for params, limit in ((SamplingParams(temperature=1.3), 27.88), (SamplingParams(top_k=5), 18.47)):
        rows, steps = 100, 200
        batch = sampler(10, rows)
        for row in range(rows):
            batch.set_row(Sequence(params, row, [1], []).init(row))
        tokens = Counter(
            token.token_id
            for step in range(steps)
            for token in batch.sample(logits.repeat(rows, 1), [*range(rows)], [1 + step] * rows).result()
        )
        weights = (logits / params.temperature).exp()
        kept = weights.topk(params.top_k or 10).indices.tolist()
        share = {token: weights[token].item() / weights[kept].sum().item() for token in kept}
        assert set(tokens) <= set(share)
        draws = rows * steps
        chi_square = sum((tokens[token] - draws * p) ** 2 / (draws * p) for token, p in share.items())
        assert chi_square < limit


def test_uniform_numbers_are_those_of_splitmix64() -> None:
    # First outputs for the state 0 of the published reference implementation (Vigna, splitmix64.c).
    published = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    assert [uniform(0, position) for position in range(3)] == [(value >> 11) / 2**53 for value in published]
    assert uniform(1, 0) != uniform(0, 0)
    assert 0.0 <= uniform(2**64 - 1, 10**9) < 1.0


def test_the_same_seed_gives_the_same_tokens_in_any_batch_row_and_after_preemption() -> None:
    vocab, steps = 300, 24
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(steps, vocab, generator=generator) * 2
    params = SamplingParams(temperature=0.9, top_p=0.95, frequency_penalty=0.5, repetition_penalty=1.2)

    def tokens(row: int, neighbours: int, preempted_at: int | None = None, seed: int = 77) -> list[int]:
        batch = sampler(vocab)
        mine = Sequence(params, seed, [4, 5], [])
        batch.set_row(mine.init(row))
        others = [each for each in range(8) if each != row][:neighbours]
        for other in others:
            batch.set_row(Sequence(SamplingParams(temperature=float(other % 3)), other, [9], []).init(other))
        for step in range(steps):
            if step == preempted_at:
                batch.clear_row(row)
                batch.set_row(mine.init(row))
            noise = torch.randn(neighbours, vocab, generator=generator)
            rows = [*others, row]
            crowd = torch.cat([noise, logits[step : step + 1]])
            sampled = batch.sample(crowd, rows, [mine.position] * len(rows)).result()
            mine.output.append(sampled[-1].token_id)
        return mine.output

    alone = tokens(row=0, neighbours=0)
    assert tokens(row=6, neighbours=5) == alone
    assert tokens(row=3, neighbours=2, preempted_at=11) == alone
    assert tokens(row=0, neighbours=0, seed=78) != alone


def test_penalties_are_those_of_their_definitions() -> None:
    logits = torch.tensor([1.0, 2.0, 0.0, -1.0, 1.0, 3.0])  # prompt 1, 1, 3; output 5, 5, 4
    params = SamplingParams(
        temperature=0.0, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logprobs=6
    )
    token = sample_one(logits, params, output=(5, 5, 4))
    # 1: 2/2    3: -1*2    4: 1/2 - 0.5 - 0.25    5: 3/2 - 0.5 - 2*0.25
    after = torch.tensor([1.0, 1.0, 0.0, -2.0, -0.25, 0.5]).log_softmax(-1).tolist()
    assert token.token_id == 0
    assert token.logprob is not None
    assert dict(token.logprob.top) == pytest.approx(dict(enumerate(after)), abs=1e-6)


def test_min_tokens_forbids_eos_and_stop_ids_until_it_is_reached() -> None:
    logits = torch.tensor([0.0, 1.0, 9.0, 2.0, 8.0])
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(4,))
    assert sample_one(logits, params).token_id == 3
    assert sample_one(logits, params, output=(3,)).token_id == 3
    assert sample_one(logits, params, output=(3, 3)).token_id == EOS[0]
    ignoring = msgspec.structs.replace(params, ignore_eos=True)
    assert sample_one(logits, ignoring).token_id == EOS[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_of_bad_logits_fails_alone(bad: float) -> None:
    vocab = 600
    kinds = [
        GREEDY,
        SamplingParams(),
        SamplingParams(top_p=0.9, logprobs=3),
        SamplingParams(top_k=4, presence_penalty=1.0),
    ]
    logits = torch.randn(8, vocab, generator=torch.Generator().manual_seed(2))
    batch, healthy = sampler(vocab), sampler(vocab)
    for row in range(8):
        for each in (batch, healthy):
            each.set_row(Sequence(kinds[row // 2], row, [1], []).init(row))
    expected = healthy.sample(logits.clone(), [*range(8)], [1] * 8).result()
    spoiled = logits.clone()
    spoiled[::2, 17] = bad
    sampled = batch.sample(spoiled, [*range(8)], [1] * 8).result()
    assert all(token.failed and token.token_id == -1 and token.logprob is None for token in sampled[::2])
    assert sampled[1::2] == expected[1::2]


def test_a_row_without_a_possible_token_fails() -> None:
    everything_banned = SamplingParams(logit_bias=dict.fromkeys(range(4), -math.inf))
    assert sample_one(torch.zeros(4), everything_banned).failed


def test_impossible_tokens_are_never_drawn_nor_named() -> None:
    params = SamplingParams(temperature=100.0, logit_bias=dict.fromkeys(range(0, 20, 2), -math.inf), logprobs=20)
    for seed in range(200):
        token = sample_one(torch.zeros(20), params, seed)
        assert token.token_id % 2 == 1
        assert token.logprob is not None
        assert [each for each, _ in token.logprob.top] == [*range(1, 20, 2)]


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_the_ends_of_the_distribution_are_tokens_that_weigh_something(u: float) -> None:
    logits = torch.full((1, 300), -math.inf)
    logits[0, 100:200] = torch.randn(100, generator=torch.Generator().manual_seed(4))
    for params in (SamplingParams(), SamplingParams(top_p=0.999), SamplingParams(min_p=0.001)):
        token = int(drawing.draw(logits, logits.amax(-1), [params], [u]))
        assert 100 <= token < 200
        assert token == reference.chosen(logits[0].tolist(), params, u)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=3.0, top_k=1),
        SamplingParams(temperature=3.0, top_p=1e-9),
        SamplingParams(temperature=3.0, min_p=1.0),
        SamplingParams(temperature=1e-50),
        SamplingParams(temperature=1e-4, top_p=0.5),
    ],
)
def test_the_narrowest_settings_are_greedy(params: SamplingParams) -> None:
    logits = torch.randn(50, 700, generator=torch.Generator().manual_seed(6)).mul(100).round()
    for seed, row in enumerate(logits):
        row[(row.argmax() + 1) :].clamp_(max=float(row.max()) - 1)  # min_p keeps equals, so there are none
        assert sample_one(row, params, seed).token_id == sample_one(row, GREEDY).token_id


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([0.0, 0.0, -math.inf, 0.0, 0.0])  # quarters, exact in binary
    for top_p, kept in ((0.25, {0}), (0.2500001, {0, 1}), (0.5, {0, 1}), (0.75, {0, 1, 3})):
        drawn = {sample_one(logits, SamplingParams(top_p=top_p), seed).token_id for seed in range(60)}
        assert drawn == kept


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.zeros(500)
    logits[[70, 300, 444]] = 2.0
    for params in (GREEDY, SamplingParams(top_k=1), SamplingParams(top_p=0.01)):
        assert sample_one(logits, params).token_id == 70


def test_a_row_keeps_nothing_of_the_request_before() -> None:
    vocab = 64
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(8))
    used = sampler(vocab)
    greedy_choice = int(logits.argmax())
    everything = SamplingParams(
        min_tokens=50,
        max_tokens=50,
        stop_token_ids=(greedy_choice,),
        logit_bias={greedy_choice: -math.inf},
        repetition_penalty=5.0,
        presence_penalty=2.0,
        frequency_penalty=2.0,
        logprobs=5,
    )
    used.set_row(Sequence(everything, 1, [greedy_choice], [greedy_choice] * 3).init(2))
    used.sample(logits.clone(), [2], [4])
    used.clear_row(2)
    with pytest.raises(AssertionError, match="row 2"):
        used.sample(logits.clone(), [2], [4])
    used.set_row(Sequence(GREEDY, 1, [greedy_choice], []).init(2))
    assert used.sample(logits.clone(), [2], [1]).result() == [SampledToken(2, greedy_choice)]


@pytest.mark.parametrize("penalty", [1e-40, 0.0009, 0.001, 100.0, 101.0, math.nan])
def test_a_repetition_penalty_that_makes_logits_overflow_is_refused(penalty: float) -> None:
    params = SamplingParams(temperature=0.0, repetition_penalty=penalty)
    if 0.001 <= penalty <= 100:
        params.validate(64)
        assert all(sample_one(sign * torch.linspace(-1e30, 1e30, 64), params).failed is None for sign in (-1, 1))
    else:
        with pytest.raises(InvalidRequestError, match=r"repetition_penalty: .* must be between 0.001 and 100"):
            params.validate(64)


def test_nothing_waits_for_the_device_before_the_result_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = sampler(100)
    styles = [GREEDY, SamplingParams(seed=1, logprobs=3), SamplingParams(temperature=0.0, frequency_penalty=1.0)]
    for row, params in enumerate(styles):
        batch.set_row(Sequence(params, row, [1], []).init(row))
    waits = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero"):
        original = getattr(Tensor, name)
        monkeypatch.setattr(
            Tensor, name, lambda self, *a, _name=name, _original=original: waits.append(_name) or _original(self, *a)
        )
    steps = [batch.sample(torch.randn(3, 100), [0, 1, 2], [1 + step] * 3) for step in range(2)]
    assert waits == []
    assert [len(step.result()) for step in steps] == [3, 3]
    assert "tolist" in waits


@pytest.mark.parametrize("vocab_size", [64, 640, 49152, 151936, 1000, 7])
def test_the_largest_logit_is_found_by_blocks_as_at_once(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randint(-9, 9, (9, vocab_size), generator=generator).float()  # full of equals
    logits[1] = -torch.inf
    logits[2, vocab_size // 2] = torch.inf
    logits[3, vocab_size - 1] = torch.nan
    peaks, tokens = largest(logits)
    expected = logits.max(dim=-1)
    torch.testing.assert_close(peaks, expected.values, rtol=0, atol=0, equal_nan=True)
    first = (logits == expected.values.unsqueeze(1)).int().argmax(dim=1)
    assert torch.equal(tokens[:3], first[:3])
    assert torch.equal(tokens[4:], first[4:])
    assert 0 <= tokens[3] < vocab_size
