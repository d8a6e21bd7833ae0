"""The pool of KV pages: which are free, and that none is lost or given out twice.

A page is page_size consecutive positions of one sequence, in all layers. The pool knows numbers only; the tensors are
`engine.model.cache`. Pages are reused last in, first out, so that a small working set stays in the caches of the CPU.
"""

from __future__ import annotations


class PagePool:
    """Pages 0 .. num_pages - 1. All methods take time proportional to the pages that they move."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._taken = [False] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def take(self, count: int) -> list[int] | None:
        """`count` pages that nobody else has, or None, and nothing taken, where there are not so many."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._taken[page] = True
        return pages

    def give_back(self, pages: list[int]) -> None:
        """Return pages, the first of them to be reused last.

        Raises:
            ValueError: a page was not taken; the pool is unchanged.
        """
        if len(set(pages)) != len(pages) or not all(0 <= page < self.num_pages and self._taken[page] for page in pages):
            raise ValueError(f"pages {pages} are not all taken")
        for page in pages:
            self._taken[page] = False
        self._free.extend(pages)

    def check(self) -> None:
        """Raise AssertionError unless every page is either taken or free exactly once. For tests and idle moments."""
        assert len(set(self._free)) == len(self._free)
        assert all(not self._taken[page] for page in self._free)
        assert sum(self._taken) == self.num_used
