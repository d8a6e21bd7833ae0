"""Logprobs of a prompt's own tokens: the head over all rows that are asked for, a slab of rows at a time.

All logits of 4,096 tokens of NeMo would take 2.1 GB; of a slab only a few numbers per token are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.limits import LOGITS_SLAB
from engine.request import TokenLogprob
from engine.sampling.logprobs import Logprobs
from engine.step import RowWork
from engine.transfer import to_device

Head = Callable[[Tensor], Tensor]
"""Logits float32 [n, V] after the hidden states with the numbers int64 [n]."""


@dataclass(frozen=True, slots=True)
class TargetScores:
    """Logprobs of the targets of a step, on their way to the host.

    Attributes:
        rows: rows that have targets, and how many each.
        slabs: of all targets, in order.
    """

    rows: list[tuple[int, int]]
    slabs: list[Logprobs]

    def result(self) -> dict[int, list[TokenLogprob]]:
        """By row; waits for the device."""
        each = iter([found for slab in self.slabs for found in slab.result()])
        return {row: [next(each) for _ in range(count)] for row, count in self.rows}


def score_targets(
    work: Sequence[RowWork], starts: Sequence[int], head: Head, vocab_size: int, device: torch.device
) -> TargetScores | None:
    """Logprobs of the targets of a step, None if it has no targets.

    Args:
        starts: number of the hidden state of each work's first token.
    """
    rows: list[tuple[int, int]] = []
    after: list[int] = []
    chosen: list[int] = []
    tops: list[int] = []
    for item, start in zip(work, starts, strict=True):
        if (targets := item.targets) is None:
            continue
        first = start + targets.start - 1 - item.start  # the logits after a token say how likely the next one is
        count = len(targets.token_ids)
        rows.append((item.row, count))
        after += range(first, first + count)
        chosen += targets.token_ids
        tops += [targets.top] * count
    if not rows:
        return None
    slabs = []
    slab = max(1, LOGITS_SLAB // (4 * vocab_size))
    for at in range(0, len(after), slab):
        part = slice(at, at + slab)
        index, tokens = to_device([after[part], chosen[part]], torch.int64, device)
        slabs.append(Logprobs(head(index), tokens, tops[part]))
    return TargetScores(rows, slabs)
