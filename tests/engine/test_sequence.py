"""The line of those that wait: in order, whatever came and went, and without a look at all of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.adapters import LoadedAdapter
from engine.request import AdapterInfo, Request
from engine.sequence import Sequence, WaitingLine

ADAPTER = LoadedAdapter(0, AdapterInfo(name="a", rank=1, nbytes=1))


def line(priorities: list[tuple[int, bool]]) -> tuple[WaitingLine, list[Sequence]]:
    """One for each (priority, with an adapter), and all that stand in it in their order."""
    waiting, all_of_them = WaitingLine(), []
    for number, (priority, adapted) in enumerate(priorities):
        request = Request(request_id=str(number), prompt_token_ids=[1], priority=priority)
        adapter = ADAPTER if adapted else None
        all_of_them.append(Sequence(request, 0, (priority, number), 0.0, [1], adapter=adapter))
        waiting.push(all_of_them[-1], 0.0)
    return waiting, sorted(all_of_them)


@given(
    priorities=st.lists(st.tuples(st.integers(-2, 2), st.booleans()), max_size=40),
    count=st.integers(0, 50),
    plain=st.booleans(),
    data=st.data(),
)
def test_the_first_few_are_the_first_in_order(
    priorities: list[tuple[int, bool]], count: int, plain: bool, data: st.DataObject
) -> None:
    waiting, stand = line(priorities)
    for sequence in data.draw(st.lists(st.sampled_from(stand), unique=True)) if stand else []:
        waiting.remove(sequence)
        stand.remove(sequence)
    wanted = [each for each in stand if not (plain and each.adapter)]
    assert waiting.first_few(count, plain=plain) == wanted[:count]
    assert (len(waiting), waiting.num_tokens) == (len(stand), len(stand))


def test_how_long_the_line_is_hardly_matters_to_who_looks_at_its_beginning_or_leaves_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared = []

    def less(self: Sequence, other: Sequence) -> bool:
        compared.append(self)
        return self.order < other.order

    def comparisons(length: int) -> int:
        waiting, stand = line([(-number % 7, number % 3 == 0) for number in range(length)])
        compared.clear()
        waiting.first_few(8, plain=False)
        waiting.remove(stand[length // 2])
        return len(compared)

    monkeypatch.setattr(Sequence, "__lt__", less)
    assert 0 < comparisons(5000) < 2 * comparisons(50)
