"""Logprobs of a prompt's own tokens: the head over all rows that are asked for, a slab of rows at a time.

All logits of 4,096 tokens of NeMo would take 2.1 GB; of a slab only a few numbers per token are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.request import TokenLogprob
from engine.sampling.logprobs import logprobs_of
from engine.step import RowWork

SLAB_BYTES = 2**26  # of logits: 128 rows of NeMo, with which the head is as fast as with more

Head = Callable[[Tensor], Tensor]
"""Logits float32 [n, V] after the hidden states with the numbers int64 [n]."""


def score_targets(
    work: Sequence[RowWork], starts: Sequence[int], head: Head, vocab_size: int, device: torch.device
) -> dict[int, list[TokenLogprob]]:
    """Logprobs of the targets of a step, by row.

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
    found: list[TokenLogprob] = []
    slab = max(1, SLAB_BYTES // (4 * vocab_size))
    for at in range(0, len(after), slab):
        part = slice(at, at + slab)
        index, tokens = torch.tensor([after[part], chosen[part]], device=device)
        found += logprobs_of(head(index), tokens, tops[part])
    each = iter(found)
    return {row: [next(each) for _ in range(count)] for row, count in rows}
