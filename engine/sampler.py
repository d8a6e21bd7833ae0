"""Logits to token ids and logprobs: bias, penalties, truncation and the draw, for all rows of a step at once.

    logits ─ logit_bias ─ min_tokens ─ penalties ─┬─ temperature ─ top_k ─ top_p ─ min_p ─ draw ─► token
                                                  └─ log-softmax ─► logprobs

Randomness is one uniform number per token, a hash of (seed, position): the same request draws the same numbers whatever
shares its batch, however its prompt was chunked, and after any pre-emption. The draw inverts the cumulative
distribution at that number: over token ids in order, or from the likeliest down where something truncates.

An all-greedy step costs one argmax and one wait for the device. What only some rows ask for is done for those rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.request import SamplingParams, TokenLogprob
from engine.step import RowInit, SampledToken

CANDIDATES = 1024  # likeliest tokens that truncation looks at before it sorts the whole vocabulary
_MASK64 = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on seed and position alone.

    SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014), its state being the
    finalised seed plus position + 1 golden-ratio steps; the upper 53 bits become the fraction.
    """
    state = (_mix(seed & _MASK64) + (position + 1) * 0x9E3779B97F4A7C15) & _MASK64
    return (_mix(state) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


@dataclass(slots=True)
class _Row:
    """What sampling knows of one running request.

    Attributes:
        counts: float32 [vocab], how often each token is in the output; None unless a penalty needs it.
        seen: bool [vocab], tokens of prompt or output; None unless the repetition penalty needs it.
        banned: ids that min_tokens forbids for now.
        bias_ids, bias: int64 and float32 [entries]; None without logit_bias.
    """

    params: SamplingParams
    seed: int
    prompt_tokens: int
    banned: Tensor | None
    bias_ids: Tensor | None
    bias: Tensor | None
    counts: Tensor | None
    seen: Tensor | None


class Sampler:
    """Sampling state of all rows. Rows are indices that the scheduler gives out; see engine.step."""

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device, eos_token_ids: tuple[int, ...]) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._eos_token_ids = eos_token_ids
        self._rows: list[_Row | None] = [None] * max_rows

    def set_row(self, init: RowInit) -> None:
        """A request takes the row, new or with the output that it had before a pre-emption."""
        params = init.sampling
        stops = (*params.stop_token_ids, *(() if params.ignore_eos else self._eos_token_ids))
        penalised = params.presence_penalty != 0 or params.frequency_penalty != 0
        self._rows[init.row] = _Row(
            params=params,
            seed=init.seed,
            prompt_tokens=len(init.prompt_token_ids),
            banned=self._ids(stops) if params.min_tokens and stops else None,
            bias_ids=self._ids(params.logit_bias) if params.logit_bias else None,
            bias=torch.tensor([*params.logit_bias.values()], dtype=torch.float32, device=self._device)
            if params.logit_bias
            else None,
            counts=self._count(init.output_token_ids) if penalised else None,
            seen=self._count(init.prompt_token_ids + init.output_token_ids) > 0
            if params.repetition_penalty != 1
            else None,
        )

    def clear_row(self, row: int) -> None:
        """The request of this row has ended."""
        self._rows[row] = None

    def sample(self, logits: Tensor, rows: list[int], positions: list[int]) -> list[SampledToken]:
        """Choose the next token of each row.

        Args:
            logits: float32 [S, vocab_size]; overwritten.
            rows: the S rows that they belong to.
            positions: where each new token will stand in its sequence, counting the prompt from 0.

        Returns:
            S results in order; `failed` where a row's logits are not numbers. The other rows are not affected.
        """
        states = [self._state(row) for row in rows]
        for scores, state, position in zip(logits, states, positions, strict=True):
            _adjust(scores, state, position)
        peaks, tokens = logits.max(dim=-1)
        drawn = [index for index, state in enumerate(states) if state.params.temperature > 0]
        if drawn:
            draws = [uniform(states[index].seed, positions[index]) for index in drawn]
            where = torch.tensor(drawn, device=self._device)
            tokens[where] = _draw(logits[where], peaks[where], [states[index].params for index in drawn], draws)
        fine, chosen = torch.stack([peaks.isfinite().long(), tokens]).tolist()

        results = []
        for index, (row, state) in enumerate(zip(rows, states, strict=True)):
            if not fine[index]:
                results.append(SampledToken(row, -1, failed="the model's logits are not finite numbers"))
                continue
            token = chosen[index]
            logprob = _logprob(logits[index], token, state.params.logprobs)
            _remember(state, token)
            results.append(SampledToken(row, token, logprob))
        return results

    def _state(self, row: int) -> _Row:
        state = self._rows[row]
        assert state is not None, f"row {row} is sampled but not admitted"
        return state

    def _ids(self, ids: Sequence[int] | dict[int, float]) -> Tensor:
        return torch.tensor([*ids], dtype=torch.int64, device=self._device)

    def _count(self, token_ids: list[int]) -> Tensor:
        ids = torch.tensor(token_ids, dtype=torch.int64)
        return torch.bincount(ids, minlength=self._vocab_size).to(self._device, torch.float32)


def _adjust(scores: Tensor, state: _Row, position: int) -> None:
    """Bias, bans and penalties, in place on one row of logits."""
    params = state.params
    if state.bias_ids is not None and state.bias is not None:
        scores[state.bias_ids] += state.bias
    if state.banned is not None and position - state.prompt_tokens < params.min_tokens:
        scores[state.banned] = -math.inf
    if state.seen is not None:
        penalty = params.repetition_penalty
        scores.copy_(torch.where(state.seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores))
    if state.counts is not None:
        scores -= params.frequency_penalty * state.counts + params.presence_penalty * (state.counts > 0)


def _remember(state: _Row, token: int) -> None:
    if state.counts is not None:
        state.counts[token] += 1
    if state.seen is not None:
        state.seen[token] = True


def _logprob(scores: Tensor, token: int, top: int | None) -> TokenLogprob | None:
    """Of one row, under softmax of the adjusted logits (temperature 1, nothing truncated)."""
    if top is None:
        return None
    logprobs = scores - scores.logsumexp(dim=-1)
    mine = logprobs[token]
    values, ids = logprobs.topk(min(top, len(scores)))
    rank = int((logprobs > mine).sum()) + 1
    return TokenLogprob(token, float(mine), rank, list(zip(ids.tolist(), values.tolist(), strict=True)))


def _draw(logits: Tensor, peaks: Tensor, params: list[SamplingParams], draws: list[float]) -> Tensor:
    """Tokens int64 [S] at the uniform numbers `draws` of the distributions that `params` make of the logits.

    Peaks are subtracted before the division, so that the smallest temperature cannot overflow.
    """
    device = logits.device
    temperatures = torch.tensor([each.temperature for each in params], dtype=torch.float32, device=device)
    logits = (logits - peaks[:, None]) / temperatures[:, None]
    u = torch.tensor(draws, dtype=torch.float64, device=device)
    truncated = [each.top_k > 0 or each.top_p < 1 or each.min_p > 0 for each in params]
    if not any(truncated):
        return _invert(logits.double().exp(), u)
    tokens = torch.empty(len(params), dtype=torch.int64, device=device)
    for wanted in (False, True):
        index = [i for i, each in enumerate(truncated) if each is wanted]
        if index:
            where = torch.tensor(index, device=device)
            part = logits[where]
            tokens[where] = (
                _draw_truncated(part, [params[i] for i in index], u[where])
                if wanted
                else _invert(part.double().exp(), u[where])
            )
    return tokens


def _draw_truncated(logits: Tensor, params: list[SamplingParams], u: Tensor) -> Tensor:
    """`_draw` among the candidates that top_k, top_p and min_p leave, from the likeliest down.

    The CANDIDATES likeliest tokens nearly always contain the cut; rows where they do not are sorted whole.
    """
    vocab = logits.shape[-1]
    size = min(CANDIDATES, vocab)
    tokens, complete = _draw_among(logits, size, params, u)
    if size < vocab and not bool(complete.all()):
        rest = (~complete).nonzero().flatten()
        tokens[rest], _ = _draw_among(logits[rest], vocab, [params[i] for i in rest.tolist()], u[rest])
    return tokens


def _draw_among(logits: Tensor, size: int, params: list[SamplingParams], u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw among the `size` likeliest tokens; also says for each row whether its cut lies inside them."""
    device, vocab = logits.device, logits.shape[-1]
    values, ids = logits.double().topk(size)
    k = torch.tensor([each.top_k or vocab for each in params], device=device)[:, None]
    top_p = torch.tensor([each.top_p for each in params], dtype=torch.float64, device=device)[:, None]
    min_p = torch.tensor([each.min_p for each in params], dtype=torch.float64, device=device)[:, None]

    weights = values.exp().where(torch.arange(size, device=device) < k, 0.0)
    within_k = k <= size
    # top_p is a share of what top_k has left: of the whole vocabulary where top_k reaches beyond the candidates.
    total = torch.where(within_k, weights.sum(-1, keepdim=True), logits.double().exp().sum(-1, keepdim=True))
    before = weights.cumsum(-1) - weights
    kept = weights.where((before < top_p * total) & (weights >= min_p * weights[:, :1]), 0.0)
    complete = within_k.flatten() | (kept[:, -1] == 0)
    return ids.gather(-1, _invert(kept, u)[:, None]).flatten(), complete


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """Index [S] of the entry in which u * sum lies, never one of weight 0. weights float64 [S, N]; u float64 [S]."""
    sums = weights.cumsum(-1)
    index = torch.searchsorted(sums, (u * sums[:, -1])[:, None], right=True).flatten()
    # Rounding may carry u * sum up to the sum itself; the last entry that weighs something is meant then.
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).long().argmax(-1)
    return torch.minimum(index, last)
