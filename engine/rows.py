"""Permanent device state of the running sequences: one row each, from admission to release.

A step's tensors are made on the device from the rows, so that a plan carries only what is new: token ids, lengths and
new pages, in one small copy.

    tables   int32 [max_batch_size, pages_per_sequence]    row 3: [ 7 | 2 | 9 | – | – ]    – = not in use
    last     int64 [max_batch_size]                        row 3: 1704    the token that the row has sampled last
    adapters slot of each row's LoRA adapter, or None      row 3: 1       (on the host)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, chain, groupby

import torch
from torch import Tensor

from engine.model.lora import Segment
from engine.ops import AttentionBatch
from engine.step import LAST_SAMPLED, RowWork
from engine.transfer import to_device


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's tensors.

    Attributes:
        token_ids: int64 [T].
        attention: where they stand.
        sampled: int64 [K], which of the T logits choose a token.
        sampled_rows: int64 [K], the rows that those are for.
        choices: (row, position) of each of those tokens in its sequence, for host code.
    """

    token_ids: Tensor
    attention: AttentionBatch
    sampled: Tensor
    sampled_rows: Tensor
    choices: list[tuple[int, int]]


class Rows:
    """What the device keeps of all rows, and the building of a step's tensors from it. Trusts the plan."""

    def __init__(self, max_rows: int, pages_per_sequence: int, page_size: int, device: torch.device) -> None:
        self._tables = torch.zeros(max_rows, pages_per_sequence, dtype=torch.int32, device=device)
        self._last = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._num_pages = [0] * max_rows
        self._adapters: list[int | None] = [None] * max_rows
        self._page_size = page_size
        self._device = device

    def clear(self, row: int, adapter: int | None = None) -> None:
        """The row starts anew with an empty block table, and the adapter of a slot."""
        self._num_pages[row] = 0
        self._adapters[row] = adapter

    def by_adapter(self, work: list[RowWork]) -> tuple[list[RowWork], list[Segment]]:
        """The work in an order in which each adapter's rows stand side by side, and the tokens of each adapter."""
        if all(self._adapters[item.row] is None for item in work):
            return work, []

        def slot(item: RowWork) -> int:
            adapter = self._adapters[item.row]
            return -1 if adapter is None else adapter

        ordered, segments, stop = sorted(work, key=slot), [], 0
        for adapter, items in groupby(ordered, slot):
            start, stop = stop, stop + sum(len(item.token_ids) for item in items)
            if adapter >= 0:
                segments.append(Segment(adapter, start, stop))
        return ordered, segments

    def batch(self, work: list[RowWork]) -> Batch:
        """The tensors of a step, after the new pages of its rows were written behind those that they have."""
        lengths = [len(item.token_ids) for item in work]
        starts = list(accumulate(lengths, initial=0))
        contexts = [item.start + length for item, length in zip(work, lengths, strict=True)]
        sampled = [
            (end - 1 - back, item.row, context - back)
            for item, end, context in zip(work, starts[1:], contexts, strict=True)
            if item.sample
            for back in range(item.drafts, -1, -1)
        ]
        new_pages = self._new_pages(work)
        parts = (
            list(chain.from_iterable(item.token_ids for item in work)),
            [item.row for item in work],
            contexts,
            starts,
            [index for index, _, _ in sampled],
            [row for _, row, _ in sampled],
            *zip(*new_pages, strict=True),
        )
        packed = to_device(list(chain.from_iterable(parts)), torch.int64, self._device)
        ids, rows, ends, begins, index, sampled_rows, *entries = torch.split(packed, [len(part) for part in parts])
        if entries:
            row, column, page = entries
            self._tables[row, column] = page.int()
        token_rows, positions = self._places(rows, ends, begins, len(ids))
        used = -(-max(contexts) // self._page_size)
        attention = AttentionBatch(
            positions=positions,
            slots=self._slots(token_rows, positions),
            query_starts=begins.int(),
            context_lens=ends.int(),
            block_tables=self._tables[:, :used].index_select(0, rows),
            max_query_len=max(lengths),
            max_context_len=max(contexts),
            query_starts_list=starts,
            context_lens_list=contexts,
        )
        if LAST_SAMPLED in parts[0]:
            ids = self._known(ids, token_rows)
        return Batch(ids, attention, index, sampled_rows, [(row, position) for _, row, position in sampled])

    def keep_sampled(self, rows: Tensor, token_ids: Tensor) -> None:
        """The tokens int64 [K] that rows int64 [K] have sampled: what LAST_SAMPLED means from now on. Of a row that is
        there several times, with drafts, any one is kept: nobody plans ahead of them."""
        self._last[rows] = token_ids

    def _new_pages(self, work: list[RowWork]) -> list[tuple[int, int, int]]:
        """(row, column, page) of the block tables, for each new page of the step."""
        entries = []
        for item in work:
            first = self._num_pages[item.row]
            entries += [(item.row, first + i, page) for i, page in enumerate(item.new_pages)]
            self._num_pages[item.row] = first + len(item.new_pages)
        return entries

    # What follows is made of device tensors alone, without a look at what is in them. In a step in which every row
    # computes one token, shapes depend on the number of rows alone.

    def _places(self, rows: Tensor, ends: Tensor, begins: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Row and position, int64 [T] each, of every token.

        Args:
            rows, ends: int64 [S], row of each sequence, and the position behind its last token of this step.
            begins: int64 [S + 1], first token of each sequence.
        """
        if tokens == len(rows):
            return rows, ends - 1
        sequence = torch.repeat_interleave(begins.diff(), output_size=tokens)
        shift = (ends - begins[1:])[sequence]
        return rows[sequence], torch.arange(tokens, device=self._device) + shift

    def _slots(self, token_rows: Tensor, positions: Tensor) -> Tensor:
        page = self._tables[token_rows, positions // self._page_size]
        return torch.add(positions % self._page_size, page, alpha=self._page_size)

    def _known(self, ids: Tensor, token_rows: Tensor) -> Tensor:
        """The ids, each LAST_SAMPLED replaced by the token that its row has sampled."""
        return torch.where(ids == LAST_SAMPLED, self._last[token_rows], ids)
