"""Permanent device state of the running sequences: one row each, from admission to release.

A step's tensors are gathered from the rows by index, so that a plan carries only what is new: token ids and new pages.

    block_tables  int32 [max_batch_size, pages_per_sequence]     row 3: [ 7 | 2 | 9 | – | – ]   – = not in use
    adapters      slot of each row's LoRA adapter, or None       row 3: 1
"""

from __future__ import annotations

from itertools import accumulate, chain, groupby

import torch
from torch import Tensor

from engine.model.lora import Segment
from engine.ops import AttentionBatch
from engine.step import RowWork


class Rows:
    """Block tables of all rows, and the building of a step's tensors from them. Trusts the plan."""

    def __init__(self, max_rows: int, pages_per_sequence: int, page_size: int, device: torch.device) -> None:
        self._tables = torch.zeros(max_rows, pages_per_sequence, dtype=torch.int32, device=device)
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

    def append_pages(self, work: list[RowWork]) -> None:
        """Write the new pages of all rows behind the ones that they have."""
        entries = []
        for item in work:
            first = self._num_pages[item.row]
            entries += [(item.row, first + i, page) for i, page in enumerate(item.new_pages)]
            self._num_pages[item.row] = first + len(item.new_pages)
        if entries:
            row, column, page = torch.tensor(entries, dtype=torch.int32).to(self._device).unbind(1)
            self._tables[row, column] = page

    def batch(self, work: list[RowWork]) -> tuple[Tensor, AttentionBatch]:
        """Token ids int64 [T] of the step, and where they stand. Two copies to the device, whatever the batch."""
        lengths = [len(item.token_ids) for item in work]
        starts = list(accumulate(lengths, initial=0))
        contexts = [item.start + length for item, length in zip(work, lengths, strict=True)]
        per_token = torch.tensor(
            [
                list(chain.from_iterable(item.token_ids for item in work)),
                list(chain.from_iterable(range(item.start, end) for item, end in zip(work, contexts, strict=True))),
                list(chain.from_iterable([item.row] * length for item, length in zip(work, lengths, strict=True))),
            ],
            dtype=torch.int64,
        ).to(self._device)
        per_sequence = torch.tensor([*starts, *contexts, *(item.row for item in work)], dtype=torch.int32)
        query_starts, context_lens, rows = torch.split(
            per_sequence.to(self._device), [len(starts), len(work), len(work)]
        )
        token_ids, positions, token_rows = per_token
        page = self._tables[token_rows, positions // self._page_size]
        used = -(-max(contexts) // self._page_size)
        return token_ids, AttentionBatch(
            positions=positions,
            slots=page.long() * self._page_size + positions % self._page_size,
            query_starts=query_starts,
            context_lens=context_lens,
            block_tables=self._tables[:, :used].index_select(0, rows),
            max_query_len=max(lengths),
            max_context_len=max(contexts),
            query_starts_list=starts,
            context_lens_list=contexts,
        )
