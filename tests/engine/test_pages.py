"""The page pool: nothing is lost, nothing is written by two, and what a key finds is what was named so."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.kv.pages import PagePool


class Model:
    """The same pool, slow and obvious: who holds what as lists, and an order in which pages became free."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.owners: list[list[int]] = []
        self.names: dict[bytes, int] = {}
        self.freed: list[int] = []  # named and held by nobody, first freed first

    @property
    def held(self) -> list[int]:
        return [page for owner in self.owners for page in owner]

    def taken(self, pages: list[int]) -> None:
        """Blank pages go first, then those that were freed first."""
        blank = set(range(self.num_pages)) - set(self.held) - set(self.freed)
        evicted = self.freed[: max(0, len(pages) - len(blank))]
        assert set(pages) - blank == set(evicted)
        assert set(evicted) == set(pages[len(pages) - len(evicted) :])
        self.freed = self.freed[len(evicted) :]
        self.names = {key: page for key, page in self.names.items() if page not in evicted}
        self.owners.append(pages)

    def given_back(self, pages: list[int]) -> None:
        self.owners.remove(pages)
        named = set(self.names.values())
        self.freed += [page for page in reversed(pages) if page not in self.held and page in named]

    def forgotten(self, pages: list[int]) -> None:
        self.names = {key: page for key, page in self.names.items() if page not in pages}
        self.freed = [page for page in self.freed if page not in pages]


MOVES = st.lists(
    st.tuples(st.sampled_from(["take", "give", "name", "hold", "forget", "forget key"]), st.integers(0, 8)), max_size=80
)


@given(num_pages=st.integers(0, 20), moves=MOVES)
def test_whatever_happens_pages_are_held_exactly_and_found_until_they_are_taken_again(
    num_pages: int, moves: list[tuple[str, int]]
) -> None:
    pool, model = PagePool(num_pages), Model(num_pages)
    for move, number in moves:
        key = str(number).encode()
        owner = model.owners[number % len(model.owners)] if model.owners else []
        if move == "take":
            pages = pool.take(number)
            assert (pages is None) == (number > num_pages - len(set(model.held)))
            if pages is not None:
                assert len(pages) == number
                assert set(pages).isdisjoint(model.held)
                model.taken(pages)
        elif move == "give" and owner:
            pool.give_back(owner)
            model.given_back(owner)
        elif move == "name" and owner and owner[-1] not in model.names.values():
            pool.name(owner[-1], key)
            model.names.setdefault(key, owner[-1])
        elif move == "hold" and (found := pool.find(key)) is not None:
            pool.hold([found])
            model.owners.append([found])
            model.freed = [page for page in model.freed if page != found]
        elif move == "forget" and owner:
            pool.forget(owner)
            model.forgotten(owner)
        elif move == "forget key" and (found := pool.find(key)) is not None:
            pool.forget([found])  # it may be free
            model.forgotten([found])
        assert {key: pool.find(key) for key in model.names} == model.names
        assert sum(pool.find(str(other).encode()) is not None for other in range(9)) == len(model.names)
        used = len(set(model.held))
        assert (pool.num_used, pool.num_free) == (used, num_pages - used)
        assert all(pool.is_held(page) == (page in model.held) for page in range(num_pages))
        pool.check(model.held)


@pytest.mark.parametrize("pages", [[3], [0, 0], [-1], [9], [0, 3]])
def test_a_page_that_is_not_taken_cannot_be_given_back(pages: list[int]) -> None:
    pool = PagePool(4)
    assert pool.take(2) == [0, 1]
    with pytest.raises(ValueError, match="not all taken"):
        pool.give_back(pages)
    assert pool.num_free == 2
    pool.check([0, 1])


def test_of_a_sequence_the_last_page_is_taken_first_and_its_beginning_is_found_longest() -> None:
    pool = PagePool(3)
    pages = pool.take(3)
    assert pages is not None
    for page, key in zip(pages, (b"0", b"1", b"2"), strict=True):
        pool.name(page, key)
    pool.give_back(pages)
    found = []
    for _ in range(3):
        pool.take(1)
        found.append([key for key in (b"0", b"1", b"2") if pool.find(key) is not None])
    assert found == [[b"0", b"1"], [b"0"], []]


def test_a_page_that_is_used_again_outlives_one_that_was_not() -> None:
    pool = PagePool(2)
    for key in (b"used", b"not"):
        pages = pool.take(1)
        assert pages is not None
        pool.name(pages[0], key)
        pool.give_back(pages)
    used = pool.find(b"used")
    assert used is not None
    pool.hold([used])
    pool.give_back([used])
    pool.take(1)
    assert (pool.find(b"used"), pool.find(b"not")) == (used, None)


def test_a_page_that_is_forgotten_while_it_is_kept_is_blank() -> None:
    pool = PagePool(2)
    pages = pool.take(2)
    assert pages is not None
    pool.name(pages[0], b"key")
    pool.give_back(pages)
    pool.forget([pages[0]])
    pool.check([])
    assert pool.take(2) is not None


@pytest.mark.parametrize("damage", ["held", "_blank", "_kept", "_page_of", "_key_of", "_holders"])
def test_the_integrity_check_sees_damage(damage: str) -> None:
    pool = PagePool(4)
    pages = pool.take(2)
    assert pages is not None
    pool.name(pages[0], b"key")
    pool.check(pages)
    match damage:
        case "held":
            pages.append(2)
        case "_blank":
            pool._blank.append(pages[0])
        case "_kept":
            pool._kept[pages[0]] = None
        case "_page_of":
            pool._page_of[b"other"] = 3
        case "_key_of":
            pool._key_of[3] = b"other"
        case "_holders":
            pool._holders[0] += 1
    with pytest.raises(AssertionError):
        pool.check(pages)
