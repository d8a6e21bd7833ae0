"""Drafts: guesses at a sequence's next tokens, computed beside its last known one and kept as far as they were right.

    computed   cat     sat     in        the last known token and two guesses, in one pass over the weights
                │       │       │
    chosen     sat      on      –        the first guess was right, so that what was chosen after it stands as well; the
                                         second was not, so that `on` is the last of this step: two tokens in one pass

Every position is sampled from its own logits with its own random number (`engine.sampling.draw`), exactly as if tokens
had come one by one; a guess only decides whether the next position was computed behind the right token. So tokens are
the same with drafts or without, greedy or drawn, and so is their distribution. That holds as far as logits do not
depend on how many rows are computed together: those of our CPU kernels do not, to the last bit; on a GPU other kernels
may serve other numbers of rows, and their rounding can turn a near tie.

Drafts pay while a step is bound by reading weights, and as far as they are likely to be right: see `Step`, `Drafter`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from engine.config import EngineConfig
from engine.step import RowWork, SampledToken

GRAMS = (4, 3, 2)  # lengths that are looked up, longest first: one token alone predicts little, five no more than four
MOST_SLOTS = 2**16  # of a table, which is 256 KiB; a longer sequence forgets more of its older n-grams
INDEXED_AT_ONCE = 4096  # tokens, some milliseconds: a long prompt that came from a cache must not stall a step

# Tokens that are computed in the time that reading the weights takes, see `Step`. CPU: steps of SmolLM2 on one core of
# 1, 4 and 8 rows take 5.8, 7.1 to 8.4 and 12.4 to 14.6 ms, as if reading were 12 to 5.5, or 5.1 to 3.6 tokens. GPU: not
# measured; arithmetic outruns memory there by hundreds of tokens, of which this is a cautious part.
CPU_READING = 4.0
GPU_READING = 64.0

LEAST_GAIN = 0.1  # about the share of a step that a host takes where a GPU computes it in a few milliseconds
RETRY = 32  # steps that look ahead between two tries

START, PACE = 0.5, 0.1  # belief in a kind of guess before the first outcome, and how far each outcome moves it


class Guess(NamedTuple):
    """Tokens that may follow. Guesses of one `kind` are right about equally often."""

    tokens: list[int]
    kind: int


class DraftSource(Protocol):
    """Guesses for one sequence. A small model could be one."""

    def propose(self, tokens: list[int], limit: int) -> Guess | None:
        """What follows `tokens`, which begin with those of the last call: 1 to `limit` tokens, or None."""


@dataclass(frozen=True, slots=True)
class Speculation:
    """What the owner of an engine and its device say about drafts.

    Attributes:
        max_tokens: drafts of one sequence in one step, >= 1.
        reading: see `Step`.
        source: makes the source of a sequence of at most so many tokens.
    """

    max_tokens: int
    reading: float
    source: Callable[[int], DraftSource]


def speculation_of(config: EngineConfig, device: str) -> Speculation | None:
    """None where no drafts are wanted."""
    if not config.max_draft_tokens:
        return None
    return Speculation(config.max_draft_tokens, CPU_READING if device == "cpu" else GPU_READING, PromptLookup)


class Step:
    """How many tokens a step is expected to yield, for the time that it takes.

    A step of n tokens takes the time of reading + n: to read the weights takes as long as to compute `reading` tokens.
    One more token that stands with probability p raises the rate if p > expected / time. That is next to nothing for
    one row on a GPU, a half or so on a CPU, and nearly 1 on either as soon as a batch or a prefill fills the step.
    """

    def __init__(self, tokens: int, reading: float) -> None:
        self._expected = float(tokens)
        self._time = reading + tokens

    def take(self, chance: float) -> bool:
        """Add a token that stands with this probability, if it pays."""
        if chance * self._time <= self._expected:
            return False
        self._expected += chance
        self._time += 1
        return True


class Drafter:
    """Drafts of one sequence: a source, and how often its guesses were right of late.

    Each guess is compared with what came, whether it was computed or not. So it costs nothing to learn that a text
    cannot be guessed, or that it can be again.
    """

    def __init__(self, source: DraftSource) -> None:
        self._source = source
        self._beliefs: dict[int, float] = {}  # kind -> probability that a token is right if those before it are
        self._guess = Guess([], 0)
        self._guessed_at = 0

    def propose(self, tokens: list[int], limit: int, step: Step) -> list[int]:
        """Tokens to compute behind the last of `tokens`, at most `limit`, as many as pay; they are added to `step`."""
        self._learn(tokens)
        guess = self._source.propose(tokens, limit) or Guess([], 0)
        self._guess, self._guessed_at = guess, len(tokens)
        belief, chance = self._beliefs.get(guess.kind, START), 1.0
        for count in range(len(guess.tokens)):
            chance *= belief
            if not step.take(chance):
                return guess.tokens[:count]
        return guess.tokens

    def _learn(self, tokens: list[int]) -> None:
        guessed, kind = self._guess
        belief = self._beliefs.get(kind, START)
        for guess, token in zip(guessed, tokens[self._guessed_at : self._guessed_at + len(guessed)], strict=False):
            belief += PACE * ((guess == token) - belief)
            if guess != token:
                break
        self._beliefs[kind] = belief


class Patience:
    """Whether a step waits for the tokens of the one before it, so that drafts can follow them.

    Drafts and a lookahead exclude each other: what follows an unknown token cannot be guessed. So a step waits as long
    as drafts yield more of late than a device that never waits for its host; else it is tried again now and then.

    Attributes:
        lasts: the answer of the last time; where it is never asked, since no step is in flight, nothing forbids drafts.
    """

    def __init__(self) -> None:
        self.lasts = True
        self._gain = 1.0  # drafts that stood for each known token, mean of the latest steps in which there could be any
        self._ahead = 0  # steps since one waited

    def wait(self) -> bool:
        """Asked once for each step that could be planned ahead."""
        self.lasts = self._gain >= LEAST_GAIN or self._ahead >= RETRY
        self._ahead = 0 if self.lasts else self._ahead + 1
        return self.lasts

    def learn(self, known: int, accepted: int) -> None:
        """So many rows had one known token to compute in a step, and so many drafts behind those stood."""
        if known:
            self._gain += PACE * (accepted / known - self._gain)


class PromptLookup:
    """What followed the last 4 tokens when they last occurred, else the last 3, else 2.

    A table for each length: hash of an n-gram -> where its latest occurrence ends. Of n-grams that share a slot the
    later one stays, and the tokens themselves say whether it is the one that was looked for. A forgotten one costs a
    token: the next is looked up as well. So time per token and memory are bounded, whatever the sequence.
    """

    def __init__(self, longest: int, most_slots: int = MOST_SLOTS) -> None:
        """
        Args:
            longest: most tokens that the sequence can have.
            most_slots: of a table, a power of two.
        """
        slots = min(most_slots, 1 << (4 * longest - 1).bit_length())
        self._mask = slots - 1
        self._ends = {n: array("i", bytes(4 * slots)) for n in GRAMS}  # 0 = nothing ends there
        self._indexed = 0  # all n-grams that end here or before are in the tables

    def propose(self, tokens: list[int], limit: int) -> Guess | None:
        """See `DraftSource.propose`. Where fewer tokens followed, the guess repeats them."""
        self._index(tokens)
        for n, ends in self._ends.items():
            gram = tokens[-n:]
            end = ends[hash(tuple(gram)) & self._mask]
            if end and tokens[end - n : end] == gram:
                guess = tokens[end : end + limit]
                while len(guess) < limit:
                    guess.append(guess[end - len(tokens)])
                return Guess(guess, n)
        return None

    def _index(self, tokens: list[int]) -> None:
        """Up to the last token but one: the last n-gram is what is looked for."""
        stop = min(len(tokens) - 1, self._indexed + INDEXED_AT_ONCE)
        for end in range(self._indexed + 1, stop + 1):
            for n, ends in self._ends.items():
                if end >= n:
                    ends[hash(tuple(tokens[end - n : end])) & self._mask] = end
        self._indexed = max(self._indexed, stop)


def standing(work: Iterable[RowWork], sampled: Iterable[SampledToken]) -> list[SampledToken]:
    """Of the tokens that were chosen at every position, those that stand: of each row that samples all up to the first
    that is not what its draft said."""
    tokens, stand = iter(sampled), []
    for item in work:
        if not item.sample:
            continue
        right = True
        for draft in [*item.token_ids[len(item.token_ids) - item.drafts :], None]:
            token = next(tokens)
            if right:
                stand.append(token)
            right = right and token.token_id == draft
    return stand
