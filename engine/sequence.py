"""A request on its way through the scheduler, and the line in which those wait that are not in the batch."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass, field
from itertools import islice

from engine.adapters import LoadedAdapter
from engine.grammar.matcher import Matcher
from engine.kv.prefix import Prefix
from engine.request import Request, Timings
from engine.speculate import Drafter


@dataclass(slots=True, eq=False)
class Sequence:
    """A request, its tokens, and what it holds while it is in the batch.

    Attributes:
        order: (priority, arrival number); smaller runs first and is pre-empted last.
        tokens: known tokens, prompt and output.
        computed: how many have their keys and values in pages, once the steps in flight are done.
        coming: tokens that those sample for it, behind the known ones; with drafts there may be more.
        in_flight: how many of them compute for it.
        guessing: one of them computes drafts of it.
        arrived, started, first_token: times on the clock of the engine's core.
        prefix: keys of its pages; None = it shares none.
        adapter: what it runs with, None = the model as it is.
        named: how many of its pages have been given their keys.
        cached: how many tokens of the prompt needed no computation.
        drafter: guesses its next tokens; None = not to be done.
        matcher: where it is in its grammar; None = it has none, or none yet.
        scored: position of the first token of the prompt whose logprob no step was asked for; the very first has none.
        ended: it has its terminal event.
    """

    request: Request
    seed: int
    order: tuple[int, int]
    arrived: float
    tokens: list[int]
    prefix: Prefix | None = None
    adapter: LoadedAdapter | None = None
    computed: int = 0
    coming: int = 0
    in_flight: int = 0
    guessing: bool = False
    row: int | None = None
    pages: list[int] = field(default_factory=list)
    named: int = 0
    cached: int = 0
    started: float | None = None
    first_token: float | None = None
    scored: int = 1
    drafter: Drafter | None = None
    matcher: Matcher | None = None
    ended: bool = False

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def shareable(self) -> int:
        """How many tokens may be found rather than computed: all but those whose logits are asked for."""
        if self.request.sampling.prompt_logprobs is not None and self.scored < self.num_prompt:
            return self.scored - 1
        return len(self.tokens) - 1

    @property
    def has_grammar(self) -> bool:
        return self.request.sampling.grammar is not None

    @property
    def length(self) -> int:
        """Tokens, known or coming."""
        return len(self.tokens) + self.coming

    @property
    def behind(self) -> int:
        """Tokens that no step computes yet; 1 while it decodes."""
        return self.length - self.computed

    def timings(self, now: float) -> Timings:
        """As of now; what has not happened yet happens now."""
        started = now if self.started is None else self.started
        first = now if self.first_token is None else self.first_token
        return Timings(queued=started - self.arrived, first_token=first - self.arrived, finished=now - self.arrived)

    def outranks(self, other: Sequence) -> bool:
        """It is of a higher class: its priority is a lower number. Then it does not wait for the other to end."""
        return self.request.priority < other.request.priority

    def __lt__(self, other: Sequence) -> bool:
        return self.order < other.order


class WaitingLine:
    """Sequences that are not in the batch, the first of (priority, arrival) first. Nothing here walks it.

    Lists in order: at 10,000 entries to move their tail costs some µs, where to order a heap anew took 2 ms.
    """

    def __init__(self) -> None:
        self._plain: list[Sequence] = []  # those without an adapter
        self._adapted: list[Sequence] = []  # those with one
        self._since: dict[Sequence, tuple[float, int]] = {}  # and tokens then; insertion order is the order of time
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._plain) + len(self._adapted)

    @property
    def first(self) -> Sequence:
        return min(line[0] for line in (self._plain, self._adapted) if line)

    @property
    def first_plain(self) -> Sequence | None:
        """The first of those without an adapter."""
        return self._plain[0] if self._plain else None

    @property
    def first_adapted(self) -> Sequence | None:
        """The first of those with one."""
        return self._adapted[0] if self._adapted else None

    @property
    def num_adapted(self) -> int:
        return len(self._adapted)

    def first_few(self, count: int, *, plain: bool) -> list[Sequence]:
        """The first `count` in order, of all or of those without an adapter."""
        return list(islice(self._plain if plain else heapq.merge(self._plain, self._adapted), count))

    def since(self, now: float) -> float:
        """When the one that waits longest joined the line; `now` if none waits."""
        return next(iter(self._since.values()))[0] if self._since else now

    def push(self, sequence: Sequence, now: float) -> None:
        insort(self._line_of(sequence), sequence)
        self._since[sequence] = now, len(sequence.tokens)
        self.num_tokens += len(sequence.tokens)

    def remove(self, sequence: Sequence) -> None:
        """Take one out."""
        line = self._line_of(sequence)
        del line[bisect_left(line, sequence)]
        self.num_tokens -= self._since.pop(sequence)[1]

    def _line_of(self, sequence: Sequence) -> list[Sequence]:
        return self._plain if sequence.adapter is None else self._adapted
