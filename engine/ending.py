"""Where a completion ends: at a stop token, where its grammar is fulfilled or leads nowhere, or for its length."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.grammar.matcher import FIELD
from engine.request import FinishReason, TokenLogprob
from engine.sequence import Sequence
from engine.step import SampledToken

BANNED = f"{FIELD}: logit_bias forbids all that can follow"


@dataclass(slots=True)
class Taken:
    """What a request keeps of the tokens that a step sampled for it: all up to the first that ends it.

    Attributes:
        logprobs: of those, if the request asked for them.
        reason: why it ends; None = it goes on.
        stop_token_id, error: see `engine.request.TokenEvent`.
        corrupted: it ends because its logits were not numbers.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    corrupted: bool = False


class Ending:
    """The ends that a model has; what else ends a completion its request says."""

    def __init__(self, eos_token_ids: Iterable[int], max_model_len: int) -> None:
        self._eos = frozenset(eos_token_ids)
        self._max_model_len = max_model_len

    def tokens_left(self, sequence: Sequence) -> int:
        """How many may still come behind the known ones."""
        room = self._max_model_len - len(sequence.tokens)
        return min(sequence.request.sampling.max_tokens - sequence.num_output, room)

    def take(self, sequence: Sequence, sampled: Iterable[SampledToken]) -> Taken:
        """Append sampled tokens one by one, up to one that ends the request: the rest never was."""
        taken = Taken()
        for each in sampled:
            self._take(sequence, each, taken)
            if taken.reason is not None:
                break
        return taken

    def _take(self, sequence: Sequence, each: SampledToken, taken: Taken) -> None:
        matcher, position = sequence.matcher, sequence.num_output
        if each.failed is not None:
            # With nothing left to choose the largest logit is -inf: that is the request's own doing, and no alarm.
            banned = matcher is not None and -math.inf in sequence.request.sampling.logit_bias.values()
            taken.reason, taken.corrupted = FinishReason.ERROR, not banned
            taken.error = BANNED if banned else each.failed
            return
        if matcher is not None:
            matcher.follow(position, each.token_id)
            if matcher.limit == position and matcher.error is not None:
                taken.reason, taken.error = FinishReason.ERROR, matcher.error
                return
        if self._stops(sequence, each.token_id):
            taken.reason, taken.stop_token_id = FinishReason.STOP, each.token_id
            return
        if matcher is not None and matcher.limit == position:
            taken.reason = FinishReason.STOP
            return
        sequence.tokens.append(each.token_id)
        taken.token_ids.append(each.token_id)
        if each.logprob is not None:
            taken.logprobs.append(each.logprob)
        if matcher is not None and matcher.limit == position + 1 and matcher.error is None:
            taken.reason = FinishReason.STOP
        elif self.tokens_left(sequence) <= 0:
            taken.reason = FinishReason.LENGTH

    def _stops(self, sequence: Sequence, token: int) -> bool:
        params = sequence.request.sampling
        if sequence.num_output < params.min_tokens:
            return False
        return token in params.stop_token_ids or (token in self._eos and not params.ignore_eos)
