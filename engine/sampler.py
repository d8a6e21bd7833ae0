"""Logits to token ids and logprobs, for all rows of a step at once.

    logits ─ logit_bias ─ min_tokens ─ penalties ─┬─ temperature ─ top_k ─ top_p ─ min_p ─ draw ─► token
                                                  └─ log-softmax ─► logprobs

An all-greedy step costs one pass over the logits and one wait for the device; what only some rows ask for is done for
those rows. A row whose logits are not numbers fails alone. What each stage means is written down once, slowly, in
`engine.sampling.reference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.request import SamplingParams, TokenLogprob
from engine.sampling.adjust import Adjustment
from engine.sampling.device import find_device_rows
from engine.sampling.draw import draw, take_rows, uniform
from engine.sampling.largest import largest
from engine.sampling.logprobs import logprobs_of
from engine.step import RowInit, SampledToken

GREEDY_BELOW = 1e-5  # temperatures below it are greedy: logits in float32 differ by more, or not at all


@dataclass(frozen=True, slots=True)
class _Row:
    params: SamplingParams
    seed: int
    adjustment: Adjustment | None


class Sampler:
    """Sampling state of all rows. Rows are indices that the scheduler gives out; see `engine.step`."""

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device, eos_token_ids: tuple[int, ...]) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._eos_token_ids = eos_token_ids
        self._rows: list[_Row | None] = [None] * max_rows
        self._on_device = find_device_rows(max_rows, device)

    def set_row(self, init: RowInit) -> None:
        """A request takes the row, new or with the output that it had before a pre-emption."""
        adjusted = Adjustment.wanted(init.sampling)
        adjustment = Adjustment(init, self._eos_token_ids, self._device) if adjusted else None
        self._rows[init.row] = _Row(init.sampling, init.seed, adjustment)
        if self._on_device is not None:
            self._on_device.set(init.row, init.sampling, init.seed, init.sampling.temperature < GREEDY_BELOW)

    def clear_row(self, row: int) -> None:
        """The request of this row has ended."""
        self._rows[row] = None

    def sample(self, logits: Tensor, rows: list[int], positions: list[int]) -> list[SampledToken]:
        """Choose the next token of each row.

        Args:
            logits: float32 [S, vocab_size]; overwritten.
            rows: the S rows that they belong to; one without penalties may stand there several times, with drafts.
            positions: where each new token will stand in its sequence, counting the prompt from 0.

        Returns:
            S results in order; `failed` where a row's logits have no finite largest one. The other rows go on.
        """
        assert logits.shape == (len(rows), self._vocab_size), f"logits {tuple(logits.shape)} for {len(rows)} rows"
        states = [self._state(row) for row in rows]
        for index, (state, position) in enumerate(zip(states, positions, strict=True)):
            if state.adjustment is not None:
                state.adjustment.apply(logits[index], position)
        if self._on_device is not None:
            peaks, tokens = self._on_device.choose(logits, rows, positions)
        else:
            peaks, tokens = self._choose(logits, states, positions)
        finite, chosen = torch.stack([peaks.isfinite().long(), tokens]).tolist()

        logprobs = self._logprobs(logits, tokens, states)
        results = []
        for index, (row, state) in enumerate(zip(rows, states, strict=True)):
            if not finite[index]:
                results.append(SampledToken(row, -1, failed="the logits have no finite maximum"))
                continue
            if state.adjustment is not None:
                state.adjustment.remember(chosen[index])
            results.append(SampledToken(row, chosen[index], logprobs.get(index)))
        return results

    def _choose(self, logits: Tensor, states: list[_Row], positions: list[int]) -> tuple[Tensor, Tensor]:
        """The largest logit and the next token of each row: float32 [S] and int64 [S]."""
        peaks, tokens = largest(logits)
        drawn = [index for index, state in enumerate(states) if state.params.temperature >= GREEDY_BELOW]
        if drawn:
            where = torch.tensor(drawn, device=self._device)
            uniforms = [uniform(states[index].seed, positions[index]) for index in drawn]
            tokens[where] = draw(
                logits.index_select(0, where), peaks[where], [states[index].params for index in drawn], uniforms
            )
        return peaks, tokens

    def _state(self, row: int) -> _Row:
        state = self._rows[row]
        assert state is not None, f"row {row} is sampled but not admitted"
        return state

    def _logprobs(self, logits: Tensor, tokens: Tensor, states: list[_Row]) -> dict[int, TokenLogprob]:
        """By index into the batch, for those that ask for it."""
        asking = ((index, state.params.logprobs) for index, state in enumerate(states))
        tops = {index: top for index, top in asking if top is not None}
        if not tops:
            return {}
        where = torch.tensor([*tops], device=self._device)
        found = logprobs_of(take_rows(logits, [*tops]), tokens[where], [*tops.values()])
        return dict(zip(tops, found, strict=True))
