"""Logprobs of chosen tokens, for the rows that ask for them, under softmax of the adjusted logits at temperature 1."""

from __future__ import annotations

import math

from torch import Tensor

from engine.request import TokenLogprob
from engine.sampling.order import likeliest
from engine.transfer import Arrival


class Logprobs:
    """What S distributions say of the chosen tokens, on its way to the host."""

    def __init__(self, logits: Tensor, chosen: Tensor, tops: list[int]) -> None:
        """
        Args:
            logits: float32 [S, V], adjusted, nothing truncated.
            chosen: int64 [S].
            tops: how many of the likeliest tokens to name, of each row. Impossible tokens (logit -inf) are never named.
        """
        norms = logits.logsumexp(-1, keepdim=True)
        own = logits.gather(-1, chosen[:, None])
        ranks = (logits > own).sum(-1) + 1
        ids = likeliest(logits, min(max(tops), logits.shape[-1]))
        self._tops = tops
        self._arrival = Arrival(chosen, (own - norms).flatten(), ranks, ids, logits.gather(-1, ids) - norms)

    def result(self) -> list[TokenLogprob]:
        """One for each row, in order; waits for the device."""
        chosen, own, ranks, ids, values = (tensor.tolist() for tensor in self._arrival.wait())
        return [
            TokenLogprob(token, own[i], ranks[i], _possible(ids[i][: self._tops[i]], values[i][: self._tops[i]]))
            for i, token in enumerate(chosen)
        ]


def _possible(token_ids: list[int], logprobs: list[float]) -> list[tuple[int, float]]:
    return [(token, value) for token, value in zip(token_ids, logprobs, strict=True) if value > -math.inf]
