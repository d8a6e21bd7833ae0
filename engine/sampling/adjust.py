"""What a request's own wishes and past do to its logits before any probability is taken: bias, bans, penalties.

Only rows that ask for something own an `Adjustment`, and it holds only the tokens that it touches, so that the cost is
that of the tokens seen and not of the vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.request import SamplingParams
from engine.step import RowInit
from engine.transfer import to_device


class Adjustment:
    """Changes the logits of one row in place: logit_bias, then min_tokens, then the penalties."""

    def __init__(self, init: RowInit, eos_token_ids: tuple[int, ...], device: torch.device) -> None:
        params = init.sampling
        stops = params.ends(eos_token_ids)
        self._banned = to_device(stops, torch.int64, device)
        self._banned_before = len(init.prompt_token_ids) + params.min_tokens if stops else 0
        self._bias_ids = to_device([*params.logit_bias], torch.int64, device)
        self._bias = to_device([*params.logit_bias.values()], torch.float32, device)
        self._penalties = _Penalties(init, device) if params.has_penalties else None

    @staticmethod
    def wanted(params: SamplingParams) -> bool:
        """Whether a request needs an Adjustment at all."""
        return bool(params.logit_bias) or params.min_tokens > 0 or params.has_penalties

    def apply(self, logits: Tensor, position: int) -> None:
        """Adjust float32 [V], which choose the token that will stand at `position`, counting the prompt from 0."""
        if len(self._bias):
            logits[self._bias_ids] += self._bias
        if position < self._banned_before:
            logits.index_fill_(0, self._banned, -math.inf)
        if self._penalties is not None:
            self._penalties.apply(logits)

    def remember(self, token_id: Tensor) -> None:
        """The token int64 [] was chosen: penalties count it from now on."""
        if self._penalties is not None:
            self._penalties.add(token_id)


class _Penalties:
    """The tokens of a row's prompt and output, and how often each one is in the output.

    ids     int64   [ 17 | 4 | 901 | 4 | – ]    capacity doubles when it is full
    counts  float32 [  0 | 2 |   1 | 2 | – ]    0 = in the prompt only

    A chosen token is appended without a look at it, which would wait for the device: so one may be there twice, with
    the same count in both places.
    """

    def __init__(self, init: RowInit, device: torch.device) -> None:
        counts = dict.fromkeys(init.prompt_token_ids if init.sampling.repetition_penalty != 1 else (), 0)
        for token in init.output_token_ids:
            counts[token] = counts.get(token, 0) + 1
        self._params = init.sampling
        self._used = len(counts)
        self._ids = to_device([*counts], torch.int64, device)
        self._counts = to_device([*counts.values()], torch.float32, device)

    def apply(self, logits: Tensor) -> None:
        """Repetition penalty of CTRL (arXiv 1909.05858), then presence and frequency penalties of the OpenAI API."""
        params = self._params
        ids, counts = self._ids[: self._used], self._counts[: self._used]
        scores = logits[ids]
        if params.repetition_penalty != 1:
            scores = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
        scores -= params.presence_penalty * (counts > 0) + params.frequency_penalty * counts
        logits[ids] = scores

    def add(self, token_id: Tensor) -> None:
        if self._used == len(self._ids):
            self._ids = torch.cat([self._ids, torch.zeros_like(self._ids), self._ids.new_zeros(16)])
            self._counts = torch.cat([self._counts, torch.zeros_like(self._counts), self._counts.new_zeros(16)])
        self._ids[self._used] = token_id
        self._counts[self._used].fill_(0)
        self._used += 1
        ids, counts = self._ids[: self._used], self._counts[: self._used]
        same = ids == token_id
        counts.copy_(torch.where(same, (counts * same).amax() + 1, counts))
