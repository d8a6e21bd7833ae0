"""Logprobs of chosen tokens, for the rows that ask for them, under softmax of the adjusted logits at temperature 1."""

from __future__ import annotations

import math

from torch import Tensor

from engine.request import TokenLogprob
from engine.sampling.order import likeliest


def logprobs_of(logits: Tensor, chosen: Tensor, tops: list[int]) -> list[TokenLogprob]:
    """What the distributions say of the chosen tokens.

    Args:
        logits: float32 [S, V], adjusted, nothing truncated.
        chosen: int64 [S].
        tops: how many of the likeliest tokens to name, of each row. Impossible tokens (logit -inf) are never named.
    """
    norms = logits.logsumexp(-1, keepdim=True)
    own = logits.gather(-1, chosen[:, None])
    ranks = ((logits > own).sum(-1) + 1).tolist()
    ids = likeliest(logits, min(max(tops), logits.shape[-1]))
    values = (logits.gather(-1, ids) - norms).tolist()
    names = ids.tolist()
    logprobs = (own - norms).flatten().tolist()
    return [
        TokenLogprob(token, logprobs[i], ranks[i], _possible(names[i][: tops[i]], values[i][: tops[i]]))
        for i, token in enumerate(chosen.tolist())
    ]


def _possible(token_ids: list[int], logprobs: list[float]) -> list[tuple[int, float]]:
    return [(token, value) for token, value in zip(token_ids, logprobs, strict=True) if value > -math.inf]
