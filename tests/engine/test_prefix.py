"""Keys of pages: equal exactly where the keys and values are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.kv.prefix import Prefix

TOKENS = st.lists(st.integers(0, 2), min_size=0, max_size=12)
ROOTS = st.tuples(st.sampled_from(["", "a", "0", "0:", ":0", "\ud800"]), st.sampled_from([None, 0, 1]))


@given(TOKENS, TOKENS, ROOTS, ROOTS, st.integers(1, 4))
def test_two_pages_have_one_key_exactly_if_all_tokens_up_to_their_ends_and_the_roots_are_equal(
    first: list[int], second: list[int], root: tuple[str, int | None], other: tuple[str, int | None], size: int
) -> None:
    one, two = Prefix(first, size, *root), Prefix(second, size, *other)
    for i in range(len(first) // size):
        for j in range(len(second) // size):
            same = root == other and first[: (i + 1) * size] == second[: (j + 1) * size]
            assert (one.key(i) == two.key(j)) == same


def test_keys_stay_when_tokens_are_appended() -> None:
    tokens = [1, 2, 3]
    prefix = Prefix(tokens, 2, "", None)
    before = prefix.key(0)
    tokens += [4, 5]
    assert (prefix.key(0), prefix.key(1)) == (before, Prefix([1, 2, 3, 4], 2, "", None).key(1))
