"""Who is next among those that wait. Pure: no clock, no tasks.

Priority classes are strict. Within a class tenants share by start-time fair queueing (Goyal, Vin, Cheng, 1996), and a
tenant's own requests keep their order:

    start(request) = max(virtual time, finish of the tenant's request before)      finish = start + cost / weight
    next is the smallest start; the virtual time is the start of the request that was taken last

Cost is in tokens. What a request costs is only guessed when it is taken; when it has ended, the finish of its tenant
is moved by the difference, so that nobody gains by a wrong guess.

A start is worked out when it is compared, not when the request arrives. That is the same: while a tenant waits, the
virtual time stays behind its start. And it lifts a tenant that a limit of its own has held back, so that it does not
make up for that at the cost of others.

For two tenants that both wait all the time, the tokens that they get, divided by their weights, never differ by more
than the largest request of one and the largest of the other.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar


@dataclass(slots=True, eq=False, kw_only=True)
class Ticket:
    """One request in the queue.

    Attributes:
        priority: class; a lower number is served first.
        cost: tokens of prompt and completions, as far as is known.
        weight: of the tenant.
        tokens: of the prompt.
        arrived: seconds on any clock.
        number: set by the queue, in the order of arrival.
    """

    tenant: str = ""
    priority: int = 0
    cost: float = 1.0
    weight: float = 1.0
    tokens: int = 0
    arrived: float = 0.0
    number: int = 0


T = TypeVar("T", bound=Ticket)


@dataclass(slots=True)
class _Line(Generic[T]):
    """Of one tenant in one class."""

    waiting: OrderedDict[T, None] = field(default_factory=OrderedDict)
    finish: float = 0.0

    @property
    def first(self) -> T:
        return next(iter(self.waiting))


@dataclass(slots=True)
class _Class(Generic[T]):
    """Attributes:
    now: the virtual time.
    taken: requests that have been taken and not ended.
    swept: lines that there may be before those that are not needed are looked for.
    """

    lines: dict[str, _Line[T]] = field(default_factory=dict)
    now: float = 0.0
    taken: int = 0
    swept: int = 64

    def first(self, may: Callable[[T], bool]) -> T | None:
        """The next of those that may run now."""
        heads = ((line.finish, line.first) for line in self.lines.values() if line.waiting)
        starts = [(max(finish, self.now), head.number, head) for finish, head in heads if may(head)]
        return min(starts)[2] if starts else None

    def sweep(self) -> None:
        """Forget tenants that have nothing here and owe nothing."""
        if len(self.lines) > self.swept:
            self.lines = {name: line for name, line in self.lines.items() if line.waiting or line.finish > self.now}
            self.swept = 64 + 2 * len(self.lines)


class FairQueue(Generic[T]):
    """Tickets that wait. Its size has no bound of its own.

    Attributes:
        tokens: of all that wait.
    """

    def __init__(self) -> None:
        self._classes: dict[int, _Class[T]] = {}
        self._ages: OrderedDict[T, None] = OrderedDict()  # all, the oldest first
        self._of_tenant: dict[str, int] = {}
        self._numbers = 0
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._ages)

    def __contains__(self, ticket: T) -> bool:
        return ticket in self._ages

    def tickets(self) -> list[T]:
        """All that wait, the oldest first."""
        return list(self._ages)

    @property
    def num_tenants(self) -> int:
        """That have requests here."""
        return len(self._of_tenant)

    def of_tenant(self, tenant: str) -> int:
        """How many of its requests wait."""
        return self._of_tenant.get(tenant, 0)

    @property
    def oldest(self) -> T | None:
        return next(iter(self._ages), None)

    def ahead_of(self, tenant: str, priority: int) -> int:
        """How many of those that wait now go before a new request for certain: better classes, and its own tenant's."""
        lines = [
            line
            for number, each in self._classes.items()
            for name, line in each.lines.items()
            if number < priority or (number == priority and name == tenant)
        ]
        return sum(len(line.waiting) for line in lines)

    def push(self, ticket: T) -> None:
        self._numbers += 1
        ticket.number = self._numbers
        self._line(ticket).waiting[ticket] = None
        self._ages[ticket] = None
        self._count(ticket, 1)

    def put_back(self, ticket: T) -> None:
        """One that was taken, and got nothing, has its place among its tenant's again."""
        line = self._line(ticket)
        line.waiting = _with(line.waiting, ticket)
        line.finish -= ticket.cost / ticket.weight
        self._classes[ticket.priority].taken -= 1
        self._ages = _with(self._ages, ticket)
        self._count(ticket, 1)

    def remove(self, ticket: T) -> None:
        """It does not wait any more."""
        del self._line(ticket).waiting[ticket]
        del self._ages[ticket]
        self._count(ticket, -1)
        self._forget(ticket.priority)

    def first(self, may: Callable[[T], bool] = lambda ticket: True) -> T | None:
        """Who is next.

        Args:
            may: whether the first of a tenant can run now, as far as limits of the tenant go.
        """
        for priority in sorted(self._classes):
            if (ticket := self._classes[priority].first(may)) is not None:
                return ticket
        return None

    def take(self, ticket: T) -> None:
        """It is served now. To be followed by `ended` or `put_back`."""
        kind, line = self._classes[ticket.priority], self._line(ticket)
        kind.now = max(kind.now, line.finish)
        line.finish = kind.now + ticket.cost / ticket.weight
        kind.taken += 1
        kind.sweep()
        self.remove(ticket)

    def ended(self, ticket: T, cost: float) -> None:
        """It has been served, and cost so much."""
        kind = self._classes[ticket.priority]
        if (line := kind.lines.get(ticket.tenant)) is not None:
            line.finish += (cost - ticket.cost) / ticket.weight
        kind.taken -= 1
        self._forget(ticket.priority)

    def _line(self, ticket: T) -> _Line[T]:
        kind = self._classes.setdefault(ticket.priority, _Class())
        return kind.lines.setdefault(ticket.tenant, _Line())

    def _count(self, ticket: T, change: int) -> None:
        self.tokens += change * ticket.tokens
        count = self._of_tenant.pop(ticket.tenant, 0) + change
        if count:
            self._of_tenant[ticket.tenant] = count

    def _forget(self, priority: int) -> None:
        """A class in which nothing waits or runs owes nobody anything."""
        kind = self._classes[priority]
        if not kind.taken and not any(line.waiting for line in kind.lines.values()):
            del self._classes[priority]


def _with(waiting: OrderedDict[T, None], ticket: T) -> OrderedDict[T, None]:
    """Tickets in the order of arrival, with one more of them. Takes its time, which an engine's death allows."""
    return OrderedDict.fromkeys(sorted([*waiting, ticket], key=lambda each: each.number))
