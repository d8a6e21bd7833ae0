"""What one engine has been handed, and whether it can take more."""

from __future__ import annotations

import asyncio
from collections import Counter

from engine import Engine
from service.admission.flight import Flight

ROWS_PER_AHEAD = 8


def look_ahead(max_batch_size: int) -> int:
    """How many completions the engine has beyond its rows.

    A row whose completion ends stands empty until the next one is there, which from here takes a step or two. Where B
    rows make completions of L tokens, B / L of them end in a step: an eighth of the rows is enough for all of 8 tokens
    and more that do not end together. Each one is also one that a tenant who comes now waits for.
    """
    return max(1, max_batch_size // ROWS_PER_AHEAD)


class Room:
    """The engine's rows and pages as far as they are spoken for.

    It gets what its rows hold and `look_ahead` more; less where pages are short, since what it cannot admit would wait
    there in an order that is not ours. Of a better class than something that it has, it gets what its rows hold of that
    class and better ones: it pre-empts for those. What waits for its grammar, or for the slot of its adapter, needs no
    row, and does not keep others from theirs; of such there are as many again at most.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._rows = engine.info.max_batch_size
        self._ahead = look_ahead(self._rows)
        self._completions: Counter[int] = Counter()  # that it has, by priority
        self._starting: dict[Flight, int] = {}  # those without an event, and the pages that they will take
        self.empty = asyncio.Event()
        self.empty.set()

    @property
    def alive(self) -> bool:
        return self.engine.failure is None

    @property
    def completions(self) -> int:
        """That the engine has been handed and has not ended."""
        return self._completions.total()

    @property
    def free(self) -> int:
        """Completions that it would take now if pages did not lack."""
        return max(0, self._most - self.completions)

    def unblocks(self, flight: Flight) -> bool:
        """Whether its grammar is compiled, or its adapter gets a slot, now or next, if it has any; else those behind it
        come first."""
        return not flight.may_block or self.engine.stats.blocked < self._rows + self._ahead

    @property
    def _most(self) -> int:
        """Completions that it is handed."""
        most = self._rows + self._ahead
        return most + min(self.engine.stats.blocked, most)

    def fits(self, flight: Flight) -> bool:
        """Whether the engine should be handed this one, the first of those that wait.

        One of many completions does not wait until all of them have rows, which would empty the batch meanwhile.
        """
        most, ahead = self._most, self._ahead
        wanted = min(flight.slots, ahead)
        level = sum(count for priority, count in self._completions.items() if priority <= flight.priority)
        if level + wanted > most:
            return False
        if level < self.completions:  # there are some of lower classes, which give way
            return self.completions + wanted <= 2 * most
        if sum(each.slots for each in self._starting) < ahead:
            return True
        stats = self.engine.stats
        # One page for each that runs is left to it by the engine, too.
        free = stats.kv_pages_total - stats.kv_pages_used - stats.running
        return sum(self._starting.values()) + self._pages(flight) <= free

    def hand(self, flight: Flight) -> None:
        flight.with_engine = set(range(flight.slots))
        self._completions[flight.priority] += flight.slots
        self._starting[flight] = self._pages(flight)
        self.empty.clear()

    def started(self, flight: Flight) -> None:
        """Its pages are among those that the engine says are in use."""
        self._starting.pop(flight, None)

    def ended(self, flight: Flight, index: int) -> None:
        """The engine is done with one of its completions, perhaps as it has said before."""
        if index in flight.with_engine:
            flight.with_engine.remove(index)
            self._give_back(flight, 1)

    def leave(self, flight: Flight) -> None:
        """Nothing of it is with the engine any more."""
        count = len(flight.with_engine)
        flight.with_engine.clear()
        self._starting.pop(flight, None)
        self._give_back(flight, count)

    def _give_back(self, flight: Flight, count: int) -> None:
        self._completions[flight.priority] -= count
        if not self._completions[flight.priority]:
            del self._completions[flight.priority]
        if not self._completions:
            self.empty.set()

    def _pages(self, flight: Flight) -> int:
        """For its first tokens; the completions share the prompt's."""
        return -(-flight.tokens // self.engine.info.page_size) + flight.slots
