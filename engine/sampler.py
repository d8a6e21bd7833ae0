"""Logits to token ids and logprobs, for all rows of a step at once.

    logits ─ logit_bias ─ min_tokens ─ penalties ─ grammar ─┬─ temperature ─ top_k ─ top_p ─ min_p ─ draw ─► token
                                                            └─ log-softmax ─► logprobs

An all-greedy step costs one pass over the logits; what only some rows ask for is done for those rows. Nothing waits for
the device before the result is asked for: what a row's next token depends on is kept there. A row whose logits are not
numbers fails alone. What each stage means is written down once, slowly, in `engine.sampling.reference`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.request import SamplingParams
from engine.sampling.adjust import Adjustment
from engine.sampling.device import find_device_rows
from engine.sampling.draw import draw, take_rows, uniform
from engine.sampling.largest import largest
from engine.sampling.logprobs import Logprobs
from engine.sampling.mask import forbid
from engine.step import RowInit, SampledToken
from engine.transfer import Arrival, to_device

GREEDY_BELOW = 1e-5  # temperatures below it are greedy: logits in float32 differ by more, or not at all


@dataclass(frozen=True, slots=True)
class _Row:
    params: SamplingParams
    seed: int
    adjustment: Adjustment | None


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens that were chosen for K rows, on their way to the host.

    Attributes:
        token_ids: int64 [K], on the device. Of a row that failed it is 0: something that can be computed.
    """

    token_ids: Tensor
    _rows: list[int]
    _arrival: Arrival
    _asking: list[int]
    _logprobs: Logprobs | None

    def result(self) -> list[SampledToken]:
        """One for each row, in order; waits for the device. `failed` where logits had no finite largest one."""
        finite, chosen = (tensor.tolist() for tensor in self._arrival.wait())
        found = [] if self._logprobs is None else self._logprobs.result()
        logprobs = dict(zip(self._asking, found, strict=True))
        return [
            SampledToken(row, chosen[index], logprobs.get(index))
            if finite[index]
            else SampledToken(row, -1, failed="the logits have no finite maximum")
            for index, row in enumerate(self._rows)
        ]


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

    def sample(
        self, logits: Tensor, rows: list[int], positions: list[int], masks: Mapping[int, bytes] | None = None
    ) -> Sampled:
        """Choose the next token of each row. One whose logits have no finite largest one fails; the others go on.

        Args:
            logits: float32 [K, vocab_size]; overwritten.
            rows: the K rows that they belong to; one without penalties may stand there several times, with drafts.
            positions: where each new token will stand in its sequence, counting the prompt from 0.
            masks: see `engine.step.Masks`; of rows that have none, anything may be chosen.
        """
        assert logits.shape == (len(rows), self._vocab_size), f"logits {tuple(logits.shape)} for {len(rows)} rows"
        states = [self._state(row) for row in rows]
        for index, (state, position) in enumerate(zip(states, positions, strict=True)):
            if state.adjustment is not None:
                state.adjustment.apply(logits[index], position)
        if masks:
            forbid(logits, rows, masks)
        if self._on_device is not None:
            peaks, tokens = self._on_device.choose(logits, rows, positions)
        else:
            peaks, tokens = self._choose(logits, states, positions)
        finite = peaks.isfinite()
        tokens = torch.where(finite, tokens, 0)
        for index, state in enumerate(states):
            if state.adjustment is not None:
                state.adjustment.remember(tokens[index])
        tops = {index: top for index, state in enumerate(states) if (top := state.params.logprobs) is not None}
        logprobs = self._logprobs(logits, tokens, tops) if tops else None
        return Sampled(tokens, rows, Arrival(finite, tokens), [*tops], logprobs)

    def _choose(self, logits: Tensor, states: list[_Row], positions: list[int]) -> tuple[Tensor, Tensor]:
        """The largest logit and the next token of each row: float32 [S] and int64 [S]."""
        peaks, tokens = largest(logits)
        drawn = [index for index, state in enumerate(states) if state.params.temperature >= GREEDY_BELOW]
        if drawn:
            where = to_device(drawn, torch.int64, self._device)
            uniforms = [uniform(states[index].seed, positions[index]) for index in drawn]
            tokens[where] = draw(
                logits.index_select(0, where), peaks[where], [states[index].params for index in drawn], uniforms
            )
        return peaks, tokens

    def _state(self, row: int) -> _Row:
        state = self._rows[row]
        assert state is not None, f"row {row} is sampled but not admitted"
        return state

    def _logprobs(self, logits: Tensor, tokens: Tensor, tops: dict[int, int]) -> Logprobs:
        where = to_device([*tops], torch.int64, self._device)
        return Logprobs(take_rows(logits, [*tops]), tokens[where], [*tops.values()])
