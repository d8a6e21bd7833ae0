"""The page pool: nothing is lost, nothing is given out twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.kv.pages import PagePool


@given(num_pages=st.integers(0, 20), moves=st.lists(st.tuples(st.booleans(), st.integers(0, 8)), max_size=60))
def test_every_page_is_free_or_taken_by_one_owner_whatever_happens(
    num_pages: int, moves: list[tuple[bool, int]]
) -> None:
    pool = PagePool(num_pages)
    owners: list[list[int]] = []
    for take, number in moves:
        if take:
            pages = pool.take(number)
            assert (pages is None) == (number > num_pages - sum(map(len, owners)))
            if pages is not None:
                assert len(pages) == number
                owners.append(pages)
        elif owners:
            pool.give_back(owners.pop(number % len(owners)))
        held = [page for owner in owners for page in owner]
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(num_pages))
        assert (pool.num_used, pool.num_free) == (len(held), num_pages - len(held))
        pool.check()


@pytest.mark.parametrize("pages", [[3], [0, 0], [-1], [9], [0, 3]])
def test_a_page_that_is_not_taken_cannot_be_given_back(pages: list[int]) -> None:
    pool = PagePool(4)
    assert pool.take(2) == [0, 1]
    with pytest.raises(ValueError, match="not all taken"):
        pool.give_back(pages)
    assert pool.num_free == 2
    pool.check()


def test_the_integrity_check_sees_a_page_given_out_twice() -> None:
    pool = PagePool(4)
    pages = pool.take(2)
    assert pages is not None
    pool._free.append(pages[0])
    with pytest.raises(AssertionError):
        pool.check()
