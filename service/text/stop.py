"""Stop strings in a stream of text. Invariants: the result does not depend on how the text was cut into pieces, and
nothing is held back except a tail that could still become a stop string.

The match that ends first wins; of those that end at the same character, the longest. One Knuth-Morris-Pratt automaton
per stop string: its state is the length of the longest tail of the text that is a beginning of the stop string, which
is at once the test for a match and the amount to hold back.
"""

from __future__ import annotations

from collections.abc import Sequence

from service.errors import invalid

MAX_STOPS = 64  # every character of output takes one automaton step for each
MAX_STOP_LENGTH = 1024  # characters; bounds what a stream may hold back


class StopMatcher:
    """Cuts a stream of text at the first stop string.

    Attributes:
        matched: the stop string that was found, None so far. After a match `push` returns nothing more.

    Raises:
        ServiceError: INVALID_ARGUMENT, a stop string is empty or too long, or there are too many.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        if len(stops) > MAX_STOPS:
            raise invalid("stop", f"has {len(stops)} strings, must have at most {MAX_STOPS}")
        for index, stop in enumerate(stops):
            if not 1 <= len(stop) <= MAX_STOP_LENGTH:
                raise invalid(f"stop[{index}]", f"has {len(stop)} characters, must have 1 to {MAX_STOP_LENGTH}")
        self.matched: str | None = None
        self._include_stop = include_stop
        self._held = ""
        # The longest first, so that it wins among those that end together.
        self._automata = [_Automaton(stop) for stop in sorted(set(stops), key=len, reverse=True)]

    def push(self, text: str) -> str:
        """Text that is certainly not part of a stop string; ends before (or with, if include_stop) a match."""
        if not self._automata:
            return text
        if self.matched is not None:
            return ""
        whole = self._held + text
        for position, char in enumerate(text, start=len(self._held) + 1):
            for automaton in self._automata:
                if automaton.step(char) and self.matched is None:
                    self.matched = automaton.pattern
            if self.matched is not None:
                self._held = ""
                return whole[: position if self._include_stop else position - len(self.matched)]
        hold = max(automaton.state for automaton in self._automata)
        self._held = whole[len(whole) - hold :]
        return whole[: len(whole) - hold]

    def flush(self) -> str:
        """What was held back, when no more text comes, or none that goes on from here."""
        held, self._held = self._held, ""
        for automaton in self._automata:
            automaton.state = 0
        return held


class _Automaton:
    """Knuth, Morris, Pratt (1977). `state` characters of `pattern` are matched at the end of the text so far."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.state = 0
        self._fallback = [0] * (len(pattern) + 1)
        border = 0
        for index in range(1, len(pattern)):
            while border and pattern[index] != pattern[border]:
                border = self._fallback[border]
            border += pattern[index] == pattern[border]
            self._fallback[index + 1] = border

    def step(self, char: str) -> bool:
        """Take one character; True if the pattern is complete with it."""
        while self.state and self.pattern[self.state] != char:
            self.state = self._fallback[self.state]
        self.state += self.pattern[self.state] == char
        return self.state == len(self.pattern)
