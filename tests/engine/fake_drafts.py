"""Sources of drafts that are always wrong, always right, or either: for sequences of the fake runner, and for real
models whose texts are known."""

from __future__ import annotations

import random

from engine.request import Request
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


class Foreseen:
    """Guesses from texts that are known already: random models and prompts never repeat themselves.

    Args:
        mistakes: the share of tokens that are guessed wrong.
    """

    def __init__(self, texts: list[list[int]], mistakes: float) -> None:
        self._texts, self._mistakes, self._random = texts, mistakes, random.Random(3)

    def propose(self, tokens: list[int], limit: int) -> Guess | None:
        for text in self._texts:
            if text[: len(tokens)] == tokens and len(text) > len(tokens):
                guess = text[len(tokens) : len(tokens) + limit]
                return Guess([self._mistaken(token) for token in guess], kind=0)
        return None

    def _mistaken(self, token: int) -> int:
        return abs(token - 1) if self._random.random() < self._mistakes else token


def texts_of(requests: list[Request], outputs: dict[str, list[int]]) -> list[list[int]]:
    """Prompt and output of each request, by whose id its output is found."""
    return [request.prompt_token_ids + outputs[request.request_id] for request in requests]
