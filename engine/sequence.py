"""A request on its way through the scheduler, and the line in which those wait that are not in the batch."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from engine.request import Request


@dataclass(slots=True, eq=False)
class Sequence:
    """A request, its tokens, and what it holds while it is in the batch.

    Attributes:
        order: (priority, arrival number); smaller runs first and is pre-empted last.
        tokens: known tokens, prompt and output.
        computed: how many of them have their keys and values in pages.
        arrived, started, first_token: times on the clock of the engine's core.
    """

    request: Request
    seed: int
    order: tuple[int, int]
    arrived: float
    tokens: list[int]
    computed: int = 0
    row: int | None = None
    pages: list[int] = field(default_factory=list)
    started: float | None = None
    first_token: float | None = None

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def behind(self) -> int:
        """Known tokens that are not computed yet; 1 while it decodes."""
        return len(self.tokens) - self.computed

    def __lt__(self, other: Sequence) -> bool:
        return self.order < other.order


class WaitingLine:
    """Sequences that are not in the batch, the first of (priority, arrival) first. Counts without walking."""

    def __init__(self) -> None:
        self._heap: list[Sequence] = []
        self._since: dict[Sequence, float] = {}  # insertion order is the order of time
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def first(self) -> Sequence:
        return self._heap[0]

    @property
    def waiting_since(self) -> float | None:
        """When the one that waits longest joined the line."""
        return next(iter(self._since.values()), None)

    def push(self, sequence: Sequence, now: float) -> None:
        heapq.heappush(self._heap, sequence)
        self._since[sequence] = now
        self.num_tokens += len(sequence.tokens)

    def pop(self) -> Sequence:
        """Remove and return the first."""
        sequence = heapq.heappop(self._heap)
        self._forget(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take one out of the middle; walks the line."""
        self._heap.remove(sequence)
        heapq.heapify(self._heap)
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        del self._since[sequence]
        self.num_tokens -= len(sequence.tokens)
