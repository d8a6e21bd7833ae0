"""The pool of KV pages: who holds them, what they are known to contain, and that none is lost.

A page is page_size consecutive positions of a sequence, in all layers. Sequences that begin alike hold the same pages.
The pool knows numbers and keys only: the tensors are `engine.model.cache`, the keys `engine.kv.prefix`.

    blank ──take──► held by one ──hold──► held by many          name: its key finds it, from now on
      ▲               ▲  │  ▲                  │
      │ without a key │  │  └────give_back─────┘
      └───────────────┼──┤
                      │  ▼ with a key
                      └─ kept: free, and still found ──take, when no page is blank: the least recently used──► held

Pages without a key are reused last in, first out, so that a small working set stays in the caches of the CPU. Of the
pages of one sequence the first are kept longest: the others are of no use without them. What is forgotten loses its
key; a kept page is blank then.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable


class PagePool:
    """Pages 0 .. num_pages - 1. All methods but `check` take time proportional to the pages that they move."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._holders = [0] * num_pages
        self._blank = list(range(num_pages - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently used first; a dict is slow at its front
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that nobody holds, whether they are still found or not."""
        return len(self._blank) + len(self._kept)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def take(self, count: int) -> list[int] | None:
        """`count` pages that nobody else holds, or None, and nothing taken, where there are not so many."""
        if count > self.num_free:
            return None
        pages = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def hold(self, pages: list[int]) -> None:
        """One more holder for each of these pages, which a key has just found."""
        for page in pages:
            self._kept.pop(page, None)
            self._holders[page] += 1

    def give_back(self, pages: list[int]) -> None:
        """One holder fewer for each. Of those that become free the first is reused last.

        Raises:
            ValueError: a page was not taken; the pool is unchanged.
        """
        if len(set(pages)) != len(pages) or not all(0 <= p < self.num_pages and self._holders[p] for p in pages):
            raise ValueError(f"pages {pages} are not all taken")
        blank = []
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0 and page in self._key_of:
                self._kept[page] = None
            elif self._holders[page] == 0:
                blank.append(page)
        self._blank.extend(reversed(blank))

    # -- what pages contain ------------------------------------------------------------------------------------

    def name(self, page: int, key: bytes) -> None:
        """`key` finds this page from now on, unless it finds another with the same contents already."""
        if self._page_of.setdefault(key, page) == page:
            self._key_of[page] = key

    def find(self, key: bytes) -> int | None:
        """The page of this key; it may be free."""
        return self._page_of.get(key)

    def is_held(self, page: int) -> bool:
        return self._holders[page] > 0

    def forget(self, pages: Iterable[int]) -> None:
        """These pages do not contain what their keys say: nothing finds them any more."""
        for page in pages:
            if (key := self._key_of.pop(page, None)) is not None:
                del self._page_of[key]
                if page in self._kept:
                    del self._kept[page]
                    self._blank.append(page)

    def _evict(self) -> int:
        page, _ = self._kept.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page

    def check(self, held: Iterable[int]) -> None:
        """Raise AssertionError unless every page is held as often as it stands in `held`, or free exactly once, and
        keys and pages agree. For tests and idle moments."""
        holders = Counter(held)
        assert all(self._holders[page] == holders[page] for page in range(self.num_pages)), "a page is lost or forged"
        free = [*self._blank, *self._kept]
        assert sorted(free) == [page for page in range(self.num_pages) if not holders[page]], "a page is not free once"
        assert {page: key for key, page in self._page_of.items()} == self._key_of, "keys and pages do not agree"
        assert self._key_of.keys().isdisjoint(self._blank), "a blank page has a key"
        assert self._kept.keys() <= self._key_of.keys(), "a page is kept without a key"
