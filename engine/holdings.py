"""What sequences hold while they run: a row, pages of the KV cache, a part in the slot of their adapter.

    enter ─► grow, name_pages ─► … ─► leave        found: pages that others have filled, held as well from `enter` on

Who gets any of it, and who must give it back, is the scheduler's affair (`engine.scheduler`). That a row or a page is
free at once, though a step in flight may still write to it, is safe for the reason that is given there.
"""

from __future__ import annotations

from bisect import insort

from engine.adapters import Adapters
from engine.kv.pages import PagePool
from engine.sequence import Sequence


class Holdings:
    """Rows, pages and slots, and the sequences that have them.

    Attributes:
        running: those that have a row, in their order.
    """

    def __init__(self, pool: PagePool, adapters: Adapters, page_size: int, max_rows: int) -> None:
        self.running: list[Sequence] = []
        self._pool = pool
        self._adapters = adapters
        self._page_size = page_size
        self._max_rows = max_rows
        self._rows = list(range(max_rows - 1, -1, -1))
        self._released: list[int] = []

    @property
    def free_rows(self) -> int:
        return len(self._rows)

    @property
    def free_pages(self) -> int:
        return self._pool.num_free

    @property
    def has_released(self) -> bool:
        """There are rows that the runner has not been told of."""
        return bool(self._released)

    def take_released(self) -> list[int]:
        """Rows that were given back since the last call."""
        released, self._released = self._released, []
        return released

    def check(self) -> None:
        """Raise AssertionError unless every page and row is where it belongs."""
        self._pool.check(page for sequence in self.running for page in sequence.pages)
        rows = [*self._rows, *(sequence.row for sequence in self.running if sequence.row is not None)]
        assert sorted(rows) == list(range(self._max_rows)), "a row is lost or given out twice"

    # -- of one that waits -------------------------------------------------------------------------------------

    def has_slot(self, sequence: Sequence) -> bool:
        """It needs no slot, or there is one for its adapter."""
        return sequence.adapter is None or self._adapters.has_room(sequence.adapter)

    def found(self, sequence: Sequence) -> list[int]:
        """Pages that hold the beginning of a sequence already, as many as it may have."""
        return self._find(sequence, sequence.shareable)

    def pages_to_take(self, sequence: Sequence) -> int:
        """Free pages that it needs for all its tokens: those that it finds held by others are not free."""
        held = sum(self._pool.is_held(page) for page in self.found(sequence))
        return self._pages_for(len(sequence.tokens)) - held

    def tokens_to_compute(self, sequence: Sequence) -> int:
        """Its tokens that are in none of the pages that it finds."""
        return len(sequence.tokens) - len(self.found(sequence)) * self._page_size

    # -- of one that runs --------------------------------------------------------------------------------------

    def enter(self, sequence: Sequence) -> int | None:
        """Give it a row and the pages that it finds, whose tokens count as computed. There are a row and a slot for it.

        Returns:
            the slot of its adapter, if it has one.
        """
        sequence.row = self._rows.pop()
        sequence.pages = self.found(sequence)
        self._pool.hold(sequence.pages)
        sequence.named = len(sequence.pages)
        sequence.computed = len(sequence.pages) * self._page_size
        insort(self.running, sequence)
        return None if sequence.adapter is None else self._adapters.enter(sequence.adapter)

    def leave(self, sequence: Sequence) -> None:
        """Take all of it back."""
        assert sequence.row is not None
        self.running.remove(sequence)
        self._pool.give_back(sequence.pages)
        sequence.pages, sequence.named, sequence.computed = [], 0, 0
        self._rows.append(sequence.row)
        self._released.append(sequence.row)
        sequence.row = None
        if sequence.adapter is not None:
            self._adapters.leave(sequence.adapter)

    def room(self, sequence: Sequence, spare: int = 0) -> int:
        """How many tokens its pages and the free ones have place for, `spare` of which stay free."""
        return (len(sequence.pages) + max(0, self._pool.num_free - spare)) * self._page_size

    def grow(self, sequence: Sequence, end: int) -> list[int]:
        """Give it pages for its first `end` tokens; there is room. Returns the new ones."""
        pages = self._pool.take(max(0, self._pages_for(end) - len(sequence.pages)))
        assert pages is not None
        sequence.pages += pages
        return pages

    # -- what others find --------------------------------------------------------------------------------------

    def name_pages(self, sequence: Sequence, end: int) -> None:
        """Let others find the pages that are full of known tokens when `end` of them are computed."""
        if sequence.prefix is not None:
            full = min(end, len(sequence.tokens)) // self._page_size
            for number in range(sequence.named, full):
                self._pool.name(sequence.pages[number], sequence.prefix.key(number))
            sequence.named = full

    def forget_pages(self, sequence: Sequence, start: int) -> None:
        """The tokens from `start` on are not computed after all."""
        self._pool.forget(sequence.pages[start // self._page_size :])

    def forget_tokens(self, sequence: Sequence) -> None:
        """Nobody finds a page with its tokens any more, not even one that it has given back."""
        self._pool.forget([*sequence.pages, *self._find(sequence, len(sequence.tokens))])

    def _find(self, sequence: Sequence, end: int) -> list[int]:
        pages: list[int] = []
        if sequence.prefix is not None:
            for number in range(end // self._page_size):
                if (page := self._pool.find(sequence.prefix.key(number))) is None:
                    break
                pages.append(page)
        return pages

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)
