"""The order of those that wait, beside the paper's own definition, and what it promises."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.admission.fair_queue import FairQueue, Ticket

TENANTS = ("a", "b", "c")
costs = st.integers(1, 20)
tickets = st.builds(Ticket, tenant=st.sampled_from(TENANTS), cost=costs)


@dataclass
class Paper:
    """Start-time fair queueing as it is written down: tags are given when a request arrives. One class."""

    now: float = 0.0
    finish: Counter[str] = field(default_factory=Counter)
    waiting: list[tuple[float, int, Ticket]] = field(default_factory=list)

    def push(self, ticket: Ticket, number: int) -> None:
        start = max(self.now, self.finish[ticket.tenant])
        self.finish[ticket.tenant] = start + ticket.cost / ticket.weight  # type: ignore[assignment]
        self.waiting.append((start, number, ticket))

    def take(self) -> Ticket:
        self.waiting.sort(key=lambda each: each[:2])
        self.now, _, ticket = self.waiting.pop(0)
        return ticket


def taken(queue: FairQueue[Ticket]) -> Ticket:
    ticket = queue.first()
    assert ticket is not None
    queue.take(ticket)
    return ticket


WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5}


@given(st.lists(st.one_of(tickets, st.none()), max_size=60))
def test_the_order_is_that_of_the_paper(steps: list[Ticket | None]) -> None:
    """A step is an arrival, or None: one is taken if any waits. Nothing ends, so that the classes live on."""
    queue, paper = FairQueue[Ticket](), Paper()
    for number, step in enumerate(steps):
        if step is not None:
            step.weight = WEIGHTS[step.tenant]
            queue.push(step)
            paper.push(step, number)
        elif len(queue):
            assert taken(queue) is paper.take()
    while len(queue):
        assert taken(queue) is paper.take()


@given(
    first=st.lists(costs, min_size=1, max_size=40),
    second=st.lists(costs, min_size=1, max_size=40),
    weights=st.tuples(st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([0.5, 1.0, 3.0])),
)
def test_tenants_that_both_wait_get_the_same_but_for_one_request_of_each(
    first: list[int], second: list[int], weights: tuple[float, float]
) -> None:
    queue = FairQueue[Ticket]()
    for tenant, weight, sizes in zip("ab", weights, (first, second), strict=True):
        for cost in sizes:
            queue.push(Ticket(tenant=tenant, cost=cost, weight=weight))
    served: dict[str, float] = {"a": 0.0, "b": 0.0}
    bound = max(first) / weights[0] + max(second) / weights[1]
    while queue.of_tenant("a") and queue.of_tenant("b"):
        ticket = taken(queue)
        served[ticket.tenant] += ticket.cost / ticket.weight
        assert abs(served["a"] - served["b"]) <= bound


@given(
    flood=st.integers(1, 200),
    before=st.integers(0, 100),
    costs_=st.tuples(costs, costs),
)
def test_who_comes_to_a_flooded_queue_waits_for_one_request_of_the_flood_at_most(
    flood: int, before: int, costs_: tuple[int, int]
) -> None:
    queue = FairQueue[Ticket]()
    for _ in range(flood):
        queue.push(Ticket(tenant="flood", cost=costs_[0]))
    for _ in range(min(before, flood - 1)):
        taken(queue)
    queue.push(Ticket(tenant="guest", cost=costs_[1]))
    assert "guest" in (taken(queue).tenant, taken(queue).tenant if len(queue) else "guest")


@given(st.lists(tickets, max_size=40))
def test_the_order_of_a_tenant_is_that_of_arrival_and_all_are_taken_once(given_: list[Ticket]) -> None:
    queue = FairQueue[Ticket]()
    for ticket in given_:
        queue.push(ticket)
    order = [taken(queue) for _ in given_]
    assert queue.first() is None
    for tenant in TENANTS:
        assert [each for each in order if each.tenant == tenant] == [each for each in given_ if each.tenant == tenant]


@given(st.lists(tickets, min_size=1, max_size=40), st.sets(st.sampled_from(TENANTS)))
def test_whoever_may_run_is_found(given_: list[Ticket], held_back: set[str]) -> None:
    queue = FairQueue[Ticket]()
    for ticket in given_:
        queue.push(ticket)
    found = queue.first(lambda ticket: ticket.tenant not in held_back)
    assert (found is not None) == any(ticket.tenant not in held_back for ticket in given_)
    assert found is None or found.tenant not in held_back


def test_better_classes_go_first_whatever_their_tenants_have_had() -> None:
    queue = FairQueue[Ticket]()
    for number in range(4):
        queue.push(Ticket(tenant="a", priority=number % 2, cost=100))
    queue.push(Ticket(tenant="b", priority=1, cost=1))
    queue.push(Ticket(tenant="b", priority=-1, cost=1))
    assert [(t.priority, t.tenant) for t in (taken(queue) for _ in range(6))] == [
        (-1, "b"),
        (0, "a"),
        (0, "a"),
        (1, "a"),
        (1, "b"),
        (1, "a"),
    ]


def test_a_tenant_that_a_limit_held_back_does_not_make_up_for_it() -> None:
    queue = FairQueue[Ticket]()
    for tenant in "ab":
        for _ in range(20):
            queue.push(Ticket(tenant=tenant, cost=1))
    for _ in range(10):
        ticket = queue.first(lambda each: each.tenant == "a")
        assert ticket is not None
        queue.take(ticket)
    assert Counter(taken(queue).tenant for _ in range(10)) == {"a": 5, "b": 5}


def test_who_gets_more_than_was_guessed_pays_for_it_afterwards() -> None:
    queue = FairQueue[Ticket]()
    for tenant in "ab":
        for _ in range(30):
            queue.push(Ticket(tenant=tenant, cost=1))
    spent: Counter[str] = Counter()
    for _ in range(22):
        ticket = taken(queue)
        cost = 10 if ticket.tenant == "a" else 1
        spent[ticket.tenant] += cost
        queue.ended(ticket, cost)
    assert abs(spent["a"] - spent["b"]) <= 10


def test_those_that_come_back_have_their_places_again_and_have_cost_nothing() -> None:
    queue = FairQueue[Ticket]()
    a1, a2, b1 = Ticket(tenant="a", cost=5), Ticket(tenant="a", cost=5), Ticket(tenant="b", cost=5)
    for ticket in (a1, a2, b1):
        queue.push(ticket)
    assert [taken(queue) for _ in range(3)] == [a1, b1, a2]
    queue.put_back(a1)
    queue.put_back(a2)
    assert queue.oldest is a1
    assert [taken(queue) for _ in range(2)] == [a1, a2]
    for ticket in (a2, a1, b1):
        queue.put_back(ticket)
    assert [taken(queue) for _ in range(3)] == [a1, b1, a2]


def test_what_is_asked_of_the_queue() -> None:
    queue = FairQueue[Ticket]()
    a1, a2 = Ticket(tenant="a", tokens=3), Ticket(tenant="a", tokens=4)
    b, urgent = Ticket(tenant="b", tokens=5), Ticket(tenant="b", tokens=6, priority=-1)
    for ticket in (a1, a2, b, urgent):
        queue.push(ticket)
    assert (len(queue), queue.tokens, queue.num_tenants, queue.of_tenant("a")) == (4, 18, 2, 2)
    assert [queue.ahead_of("a", 0), queue.ahead_of("c", 0), queue.ahead_of("b", -1), queue.ahead_of("a", 1)] == [
        3,
        1,
        1,
        4,
    ]
    queue.remove(a1)
    assert (queue.oldest, len(queue), queue.tokens) == (a2, 3, 15)
    for ticket in (a2, b, urgent):
        queue.remove(ticket)
    assert (queue.oldest, len(queue), queue.tokens, queue.num_tenants) == (None, 0, 0, 0)


@given(st.data())
def test_nothing_is_kept_of_those_that_have_gone(data: st.DataObject) -> None:
    queue, waiting, running = FairQueue[Ticket](), list[Ticket](), list[Ticket]()
    for _ in range(data.draw(st.integers(0, 40))):
        step = data.draw(st.sampled_from(["push", "take", "remove", "end", "put back"]))
        if step == "push":
            ticket = Ticket(tenant=data.draw(st.sampled_from(TENANTS)), priority=data.draw(st.integers(0, 1)))
            queue.push(ticket)
            waiting.append(ticket)
        elif step == "take" and waiting:
            ticket = taken(queue)
            waiting.remove(ticket)
            running.append(ticket)
        elif step == "remove" and waiting:
            queue.remove(waiting.pop(data.draw(st.integers(0, len(waiting) - 1))))
        elif step == "end" and running:
            queue.ended(running.pop(data.draw(st.integers(0, len(running) - 1))), 3)
        elif step == "put back" and running:
            ticket = running.pop(data.draw(st.integers(0, len(running) - 1)))
            queue.put_back(ticket)
            waiting.append(ticket)
        assert len(queue) == len(waiting)
    for ticket in waiting:
        queue.remove(ticket)
    for ticket in running:
        queue.ended(ticket, 1)
    assert queue._classes == {}
    assert (queue.tokens, queue._of_tenant) == (0, {})


@pytest.mark.parametrize("tenants", [1000])
def test_tenants_that_are_even_are_forgotten_though_their_class_is_never_idle(tenants: int) -> None:
    queue = FairQueue[Ticket]()
    queue.push(Ticket(tenant="steady", cost=1))
    last = taken(queue)
    for number in range(tenants):
        queue.push(Ticket(tenant=f"passer-by {number}", cost=1))
        queue.push(Ticket(tenant="steady", cost=1))
        for _ in range(2):
            ticket = taken(queue)
            queue.ended(last, 1)
            last = ticket
    assert len(queue._classes[0].lines) < 200
