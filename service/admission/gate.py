"""The one queue of the service, and the gate between it and the engine.

    enter ──► join ──► queue, by (class, tenant's share, arrival) ──gate──► engine ──► events ──► leave
      │         │        │                                          │
    refused  refused   deadline                     what it can run, and a few more

- What does not fit is refused at once: for the number of requests before anything is made of the prompt, for its tokens
  as soon as they are counted.
- Requests wait here and not in the engine, so that order, deadlines and the engine's death concern this queue alone.
- A place with the engine is free when the engine is done, not when the last event has been read.
- While there is no engine the gate is closed: nothing is handed on, the queue stays, deadlines go on.

The bounds hold for all that wait, but for those whose engine died: they were accepted, and come back to the head.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable

from engine import Engine
from service.admission.delivery import Delivery
from service.admission.fair_queue import FairQueue
from service.admission.flight import Flight
from service.admission.limits import UNLIMITED, LimitsOf, QueueLimits
from service.admission.pace import Mean, Pace
from service.admission.room import Room
from service.admission.stats import AdmissionStats, Refusal
from service.admission.tenants import Tenants
from service.errors import Code, ServiceError
from service.generation import GenerationRequest

EXPECTED_TOKENS = 256.0  # of a completion, before any has ended
SURE = 0.5  # of the wait that is expected: a deadline before that will not be met
RESERVED = 8  # one part of so many of the queue is for tenants that have less than their share in it
RETRY_SECONDS = (0.1, 60.0)  # who is told to wait longer gives up
RETRY_UNKNOWN = 1.0  # while nothing has been measured
RETRY_SPREAD = 0.5  # later, at most: those who were refused together should not come back together


class Admission:
    """See the module. Belongs to one event loop.

    Args:
        limits_of: what holds for a tenant.

    Attributes:
        in_flight: accepted requests that have not ended; `idle` is set while there are none.
    """

    def __init__(
        self,
        limits: QueueLimits | None = None,
        limits_of: LimitsOf = lambda tenant: UNLIMITED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits or QueueLimits()
        self.in_flight = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self._limits_of = limits_of
        self._clock = clock
        self._room: Room | None = None  # of the engine behind the gate while it is open
        self._latest: Room | None = None
        self._lost: ServiceError | None = None  # why there will be no engine
        self._max_requests = self._max_tokens = 0
        self._queue: FairQueue[Flight] = FairQueue()
        self._entering: Counter[str] = Counter()  # requests whose prompts are being encoded, by tenant
        self._handed: dict[Flight, Room] = {}
        self._tenants = Tenants(limits_of)
        self._refused: Counter[Refusal] = Counter()
        self._pace = Pace()
        self._length = Mean(EXPECTED_TOKENS)
        self._random = random.Random()
        self._expired = self._slow_readers = 0
        self._arrived = self._arrived_tokens = self._finished = 0

    # -- the gate ----------------------------------------------------------------------------------------------

    def open(self, engine: Engine) -> None:
        """There is an engine: hand it what waits."""
        if self._latest is None or self._latest.engine is not engine:
            self._latest = Room(engine)
        self._room, self._lost = self._latest, None
        self._max_requests, self._max_tokens = self.limits.bounds(engine.info)
        self._pump()

    def close(self) -> None:
        """There is none, until the next `open`. What it has goes on, if it lives."""
        self._room = None
        self._pace.pause()

    def look(self) -> None:
        """To be called now and then: that requests wait with the engine for something else than a row, and so keep
        nobody from one, its statistics tell, and no event of any request."""
        self._pump()

    @property
    def running(self) -> int:
        """Requests that an engine has or, while the gate is open, will get."""
        if self._room is not None:
            return self.in_flight
        return sum(bool(flight.with_engine) for flight in self._handed)

    async def settled(self) -> None:
        """Wait until there are none."""
        while self.running:
            await (self.idle if self._room is not None else self._busy().empty).wait()

    def _busy(self) -> Room:
        return next(room for flight, room in self._handed.items() if flight.with_engine)

    def fail(self, error: ServiceError) -> None:
        """There will be none: who waits learns of it, and who comes to wait."""
        self.close()
        self._lost = error
        for flight in self._queue.tickets():
            self._give_up(flight, error)

    # -- a request's way ---------------------------------------------------------------------------------------

    def enter(self, request: GenerationRequest) -> Flight:
        """A request has come, whose prompt may be unknown yet. To be followed by `join` and in the end by `leave`.

        Raises:
            ServiceError: PERMISSION_DENIED, RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED.
        """
        now, tenant = self._clock(), request.tenant
        limits = self._limits_of(tenant)
        if limits.best_priority is not None and request.priority < limits.best_priority:
            rule = f"must be at least {limits.best_priority}, the best class of this tenant"
            raise ServiceError(Code.PERMISSION_DENIED, f"priority: {request.priority} {rule}", field="priority")
        mine = self._queue.of_tenant(tenant) + self._entering.get(tenant, 0)
        free = 0 if self._room is None else self._room.free
        if len(self._queue) + self._entering.total() - free >= self._most(tenant, mine):
            raise self._full()
        if limits.max_queued is not None:
            own = self._tenants.room(tenant)
            if mine - (free if own is None else min(free, own)) >= limits.max_queued:
                raise self._tenant_full(limits.max_queued)
        if (wait := self._tenants.seconds_to_wait(tenant, now)) > 0:
            message = f"this tenant has used its {limits.tokens_per_minute} tokens per minute"
            raise self._refuse(Refusal.TENANT_TOKENS, message, wait)
        self._check_deadline(request, now)
        flight = Flight(
            tenant=tenant,
            priority=request.priority,
            weight=limits.weight,
            arrived=now,
            deadline=request.deadline,
            slots=request.n,
        )
        self._entering[tenant] += 1
        self.in_flight += 1
        self.idle.clear()
        return flight

    async def join(self, flight: Flight, prompt_tokens: int, new_tokens: int, *, may_block: bool = False) -> None:
        """The prompt is known: wait for the flight's turn, which is now if there is room.

        Args:
            new_tokens: most that one completion may get.
            may_block: see `Flight`.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED, at once; DEADLINE_EXCEEDED; UNAVAILABLE, there will be no engine.
        """
        if self._lost is not None:
            raise self._lost
        flight.tokens, flight.may_block = prompt_tokens, may_block
        flight.cost = prompt_tokens + min(new_tokens, self._length.value) * flight.slots
        self._tenants.use(flight, flight.cost, self._clock())
        self._entered(flight)
        self._queue.push(flight)
        turn = self._wait(flight)
        if flight in self._queue:
            self._check_bounds(flight)
        flight.accepted = True
        self._arrived += 1
        self._arrived_tokens += prompt_tokens
        await self._turn(flight, turn)

    async def join_again(self, flight: Flight) -> None:
        """Its engine died before it had an event: it is the first of its tenant that waits for the next one.

        Raises:
            ServiceError: as `join`.
        """
        if self._lost is not None:
            raise self._lost
        self._land(flight)
        flight.returned = True
        self._queue.put_back(flight)
        await self._turn(flight, self._wait(flight))

    def began(self, flight: Flight) -> None:
        """It has its first event."""
        flight.started = True
        if (room := self._handed.get(flight)) is not None:
            room.started(flight)
        self._pump()

    def completed(self, flight: Flight, index: int) -> None:
        """The engine is done with a completion, perhaps as it has said before."""
        if (room := self._handed.get(flight)) is not None and index in flight.with_engine:
            room.ended(flight, index)
            self._tenants.runs(flight, -1)
            self._pump()

    def leave(self, flight: Flight, delivery: Delivery | None = None) -> None:
        """It has ended, wherever it was, perhaps as was said before.

        Args:
            delivery: of its events, if it came to that.
        """
        if flight.left:
            return
        flight.left = True
        self._finished += flight.accepted
        new_tokens = 0
        if delivery is not None:
            new_tokens = delivery.tokens
            self._expired += delivery.expired
            self._slow_readers += delivery.abandoned
        self._entered(flight)
        spent = 0.0
        if flight in self._handed:
            spent = flight.tokens + new_tokens
            self._land(flight)
            self._queue.ended(flight, spent)
            if new_tokens:
                self._length.add(new_tokens / flight.slots)
        elif flight in self._queue:
            self._queue.remove(flight)
        self._tenants.use(flight, spent, self._clock())
        self.in_flight -= 1
        if self.in_flight == 0:
            self.idle.set()
        self._pump()

    @property
    def stats(self) -> AdmissionStats:
        oldest = self._queue.oldest
        return AdmissionStats(
            queued=len(self._queue),
            queued_tokens=self._queue.tokens,
            oldest_queued_seconds=0.0 if oldest is None else self._clock() - oldest.arrived,
            handed=sum(len(flight.with_engine) for flight in self._handed),
            arrived=self._arrived,
            arrived_tokens=self._arrived_tokens,
            finished=self._finished,
            refused={reason: self._refused[reason] for reason in Refusal},
            expired=self._expired,
            slow_readers=self._slow_readers,
        )

    # -- whose turn it is --------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Hand on what there is room for."""
        now = self._clock()
        if self._room is not None and not self._room.alive:
            self.close()
        while self._room is not None and (flight := self._queue.first(self._may_run)) is not None:
            if flight.turn is None or flight.turn.done():  # its task was cancelled, and is about to leave
                self._queue.remove(flight)
            elif flight.late(now):
                self._give_up(flight, self._too_late())
            elif not self._room.fits(flight):
                break
            else:
                self._hand(flight, self._room, now)
        if not self._queue:
            self._pace.pause()

    def _may_run(self, flight: Flight) -> bool:
        """Where not, the first of another tenant is asked."""
        return self._tenants.may_run(flight) and (self._room is None or self._room.unblocks(flight))

    def _hand(self, flight: Flight, room: Room, now: float) -> None:
        self._queue.take(flight)
        self._pace.moved(now)
        room.hand(flight)
        self._handed[flight] = room
        self._tenants.runs(flight, flight.slots)
        flight.waited = now - flight.arrived
        assert flight.turn is not None
        flight.turn.set_result(None)

    def _land(self, flight: Flight) -> None:
        """The engine has nothing of it any more."""
        self._tenants.runs(flight, -len(flight.with_engine))
        self._handed.pop(flight).leave(flight)

    def _give_up(self, flight: Flight, error: ServiceError) -> None:
        self._queue.remove(flight)
        if flight.turn is not None and not flight.turn.done():
            flight.turn.set_exception(error)

    def _wait(self, flight: Flight) -> asyncio.Future[None]:
        """Its turn, which may have come already."""
        flight.turn = turn = asyncio.get_running_loop().create_future()
        self._pump()
        if not turn.done() and self._room is not None:
            self._pace.waiting(self._clock())
        return turn

    async def _turn(self, flight: Flight, turn: asyncio.Future[None]) -> None:
        try:
            async with asyncio.timeout_at(flight.deadline):
                await turn
        except TimeoutError:
            raise self._too_late() from None
        finally:
            flight.turn = None
            if turn.done() and not turn.cancelled():
                turn.exception()  # seen, even by a task that was cancelled at the same time

    def _entered(self, flight: Flight) -> None:
        if flight.entering:
            flight.entering = False
            self._entering[flight.tenant] -= 1
            if not self._entering[flight.tenant]:
                del self._entering[flight.tenant]

    # -- what is refused ---------------------------------------------------------------------------------------

    def _most(self, tenant: str, mine: int) -> int:
        """Requests that may wait when one more of this tenant does, of which `mine` wait now.

        Who has many there leaves the last places to those who have few: a full queue of one tenant's requests would
        take from the others what fair order gives them.
        """
        most = self._max_requests
        share = most / max(2, self._queue.num_tenants)
        return most if not tenant or mine < share else most - most // RESERVED

    def _check_bounds(self, flight: Flight) -> None:
        """Of one that has joined those that wait; raises ServiceError when it is one too many."""
        error = None
        mine, own_limit = self._queue.of_tenant(flight.tenant), self._limits_of(flight.tenant).max_queued
        if len(self._queue) > self._most(flight.tenant, mine - 1):
            error = self._full(len(self._queue) - 1)
        elif self._queue.tokens > self._max_tokens:
            others = self._queue.tokens - flight.tokens
            message = f"the queue is full: {others} tokens wait, with this request's {flight.tokens} too many"
            error = self._refuse(Refusal.QUEUE_TOKENS, f"{message} for the limit of {self._max_tokens}")
        elif own_limit is not None and mine > own_limit:
            error = self._tenant_full(own_limit)
        if error is not None:
            self._queue.remove(flight)
            raise error

    def _check_deadline(self, request: GenerationRequest, now: float) -> None:
        """Of one that has just come. Certain to go before it are better classes and its own tenant's requests."""
        if request.deadline is None:
            return
        wait = 0.0
        if self._room is not None and (pace := self._pace.seconds) is not None:
            wait = SURE * pace * self._queue.ahead_of(request.tenant, request.priority)
        if now + wait >= request.deadline:
            self._refused[Refusal.DEADLINE] += 1
            left = request.deadline - now
            message = f"the deadline is in {left:.1f} s, and the queue takes {wait:.1f} s at least"
            raise ServiceError(Code.DEADLINE_EXCEEDED, message if left > 0 else "the deadline has passed")

    def _too_late(self) -> ServiceError:
        self._refused[Refusal.DEADLINE_IN_QUEUE] += 1
        return ServiceError(Code.DEADLINE_EXCEEDED, "the deadline passed while the request waited in the queue")

    def _full(self, waiting: int | None = None) -> ServiceError:
        waiting = len(self._queue) + self._entering.total() if waiting is None else waiting
        return self._refuse(Refusal.QUEUE_FULL, f"the queue is full: {waiting} requests wait")

    def _tenant_full(self, limit: int) -> ServiceError:
        return self._refuse(Refusal.TENANT_QUEUE, f"of this tenant's requests at most {limit} may wait")

    def _refuse(self, reason: Refusal, message: str, seconds: float | None = None) -> ServiceError:
        """RESOURCE_EXHAUSTED, counted.

        Args:
            seconds: when a retry makes sense; None = when all that wait now have been handed to the engine.
        """
        self._refused[reason] += 1
        if seconds is None:
            pace = self._pace.seconds
            seconds = RETRY_UNKNOWN if pace is None else pace * len(self._queue)
        seconds *= 1 + self._random.random() * RETRY_SPREAD
        low, high = RETRY_SECONDS
        hint = round(1000 * min(max(seconds, low), high))
        return ServiceError(Code.RESOURCE_EXHAUSTED, f"{message}; retry later", retry_after_ms=hint)
