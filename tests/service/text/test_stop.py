"""Stop strings: what comes out never depends on how the text was cut, and little is held back."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import Code, ServiceError
from service.text.stop import MAX_STOP_LENGTH, MAX_STOPS, StopMatcher

TEXT = st.text(alphabet="ab🙂", max_size=40)
STOPS = st.lists(st.text(alphabet="ab🙂", min_size=1, max_size=5), min_size=1, max_size=4)


def cut_naively(text: str, stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    """The reference: at every end, shortest text first, is there a stop string? The longest one counts."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include_stop else end - len(stop)], stop
    return text, None


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]


@settings(max_examples=400, deadline=None)
@given(TEXT, STOPS, st.lists(st.integers(0, 40)), st.booleans())
def test_any_cutting_gives_what_a_search_in_the_whole_text_gives(
    text: str, stops: list[str], cuts: list[int], include_stop: bool
) -> None:
    matcher = StopMatcher(stops, include_stop=include_stop)
    out = "".join(matcher.push(piece) for piece in pieces_of(text, cuts)) + matcher.flush()
    assert (out, matcher.matched) == cut_naively(text, stops, include_stop)


def test_a_stop_string_that_overlaps_itself_is_found_after_false_starts() -> None:
    for length in range(1, 8):
        for stop in map("".join, itertools.product("ab", repeat=length)):
            for one, two in itertools.product(range(length), repeat=2):
                text = stop[:one] + stop[:two] + stop
                matcher = StopMatcher([stop])
                assert (matcher.push(text), matcher.matched) == (text[: text.index(stop)], stop)


@settings(max_examples=200, deadline=None)
@given(TEXT, STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    out = ""
    for position, char in enumerate(text, start=1):
        out += matcher.push(char)
        if matcher.matched:
            return
        tail = text[len(out) : position]
        assert tail == "" or any(stop.startswith(tail) and stop != tail for stop in stops)


def test_a_stop_string_across_pieces_is_cut_off_and_named() -> None:
    matcher = StopMatcher(["###", "END"])
    assert [matcher.push(piece) for piece in ("one E", "N", "D two")] == ["one ", "", ""]
    assert matcher.matched == "END"
    assert matcher.push("more") == ""
    assert matcher.flush() == ""


def test_a_tail_that_became_no_stop_string_is_released() -> None:
    matcher = StopMatcher(["###"])
    assert [matcher.push("a##"), matcher.push("b"), matcher.push("#"), matcher.flush()] == ["a", "##b", "", "#"]


def test_without_stop_strings_text_passes_at_once() -> None:
    assert StopMatcher([]).push("abc") == "abc"


@pytest.mark.parametrize(
    ("stops", "field"),
    [(["a", ""], "stop[1]"), (["x" * (MAX_STOP_LENGTH + 1)], "stop[0]"), (["a"] * (MAX_STOPS + 1), "stop")],
)
def test_bad_stop_strings_are_refused_by_name(stops: list[str], field: str) -> None:
    with pytest.raises(ServiceError) as caught:
        StopMatcher(stops)
    assert (caught.value.code, caught.value.field) == (Code.INVALID_ARGUMENT, field)
