"""Sources of drafts that are always wrong, always right, or either, for sequences of the fake runner."""

from __future__ import annotations

import random

from engine.speculate import Guess
from tests.engine.fake_runner import VOCAB, next_token


class Right:
    """What greedy requests without an adapter will get; to others it is noise."""

    def __init__(self, longest: int) -> None:
        self.longest = longest

    def propose(self, tokens: list[int], limit: int) -> Guess:
        assert limit >= 1
        assert len(tokens) + limit < self.longest  # the last token is never computed
        guess: list[int] = []
        for _ in range(limit):
            guess.append(next_token(tokens + guess, 0))
        return Guess(guess, 0)


class Wrong(Right):
    """Never what comes next, for those requests."""

    def propose(self, tokens: list[int], limit: int) -> Guess:
        guess, kind = super().propose(tokens, limit)
        return Guess([(guess[0] + 1) % VOCAB, *guess[1:]], kind)


class Mixed(Right):
    """The first few are right, if any, and sometimes there is no guess."""

    def __init__(self, longest: int) -> None:
        super().__init__(longest)
        self._random = random.Random(longest)

    def propose(self, tokens: list[int], limit: int) -> Guess | None:  # type: ignore[override]
        guess, kind = super().propose(tokens, limit)
        wrong = self._random.randint(-1, limit)
        if wrong < 0:
            return None
        return Guess([*guess[:wrong], *(self._random.randrange(VOCAB) for _ in guess[wrong:])], kind)


SOURCES = (Right, Wrong, Mixed)
