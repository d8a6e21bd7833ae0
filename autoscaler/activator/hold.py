"""The room in which requests wait for a replica, and the pace at which they leave it.

entered ──► waiting ──► handed to a replica ──► started: the answer begins, nothing is repeated from here on
              ▲                 │
              └── full, or lost ┘

- Bounded by requests, those whose answers run included, and by bytes that are kept; what does not fit is refused at
  once, with a time to come again.
- In order of arrival. One that a replica refused comes back to its old place, and lets others pass until its time.
- A replica is handed no more at once than it runs twice over: so that its batch never runs dry, and the others wait
  here, where the next replica can take them. It shrinks when the replica refuses and grows with each answer, as the
  window of TCP does, and for the same reason: nobody tells us how much others send there.
- Until its answer starts a request can be handed over anew; it is given up after MOST_LOST replicas were lost with it,
  since it might be the reason.
- Every wait ends: by the client's deadline, by `hold_seconds`, by cancellation, which frees the place at once.

Belongs to one event loop. Times are of time.monotonic().
"""

from __future__ import annotations

import asyncio
import bisect
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

from autoscaler.activator.progress import Progress
from autoscaler.activator.refused import Gone, Reason, Refused
from autoscaler.activator.replica import Replica, Window
from autoscaler.activator.settings import HoldLimits

REST_SECONDS = 1.0  # of a replica that was not reached, or was lost: its server may have begun to stop
MOST_LOST = 3  # attempts at one request that ended without an answer
RETRY_SECONDS = (1.0, 60.0)  # the official OpenAI client obeys no longer wait
RETRY_UNKNOWN = 10.0  # seconds, where nobody knows how long a start takes
RETRY_SPREAD = 0.5  # of the hint, added at random: who was refused together shall not come back together


class Held:
    """One request, from its arrival to the end of its answer; a context manager around all of that."""

    def __init__(self, room: Room, number: int, arrived: float, deadline: float | None) -> None:
        self.number, self.arrived = number, arrived
        self.size = 0
        self.not_before = 0.0
        self.room = room
        self.deadline = deadline
        self._granted: asyncio.Future[Replica] | None = None
        self._window: Window | None = None
        self._lost = 0
        self.is_started = False

    def __enter__(self) -> Held:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._free()
        self.room._left(self, error)

    @property
    def waits(self) -> bool:
        """For a replica."""
        return self._granted is not None and not self._granted.done()

    @property
    def until(self) -> float:
        """Its deadline, the client's or ours."""
        ours = self.arrived + self.room.limits.hold_seconds
        return ours if self.deadline is None else min(ours, self.deadline)

    def keep(self, size: int) -> None:
        """So many bytes more of it are kept, for the replica.

        Raises:
            Refused: they do not fit.
        """
        self.room._keep(self, size)

    def forget(self) -> None:
        """Nothing of it is kept any more."""
        self.room._keep(self, -self.size)

    async def until_here(self, arrival: Coroutine[Any, Any, object]) -> None:
        """Wait for what has to arrive before it waits for a replica.

        Raises:
            Refused: it did not come in time.
        """
        arriving, closing = asyncio.ensure_future(arrival), asyncio.ensure_future(self.room.closing.wait())
        try:
            left = max(0.0, self.until - self.room.now())
            await asyncio.wait({arriving, closing}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not arriving.done():
                raise self.room.closed_down() if closing.done() else self.late()
            arriving.result()
        finally:
            arriving.cancel()
            closing.cancel()
            await asyncio.gather(arriving, closing, return_exceptions=True)

    async def turn(self) -> Replica:
        """Wait for a replica. To be followed by one of `started`, `refused` and `lost`.

        Raises:
            Refused: none came in time.
        """
        self._granted = asyncio.get_running_loop().create_future()
        try:
            self.room._wait(self, self._granted)
            async with asyncio.timeout(max(0.0, self.until - self.room.now())):
                return await self._granted
        except TimeoutError:
            raise self.late() from None
        finally:
            self.room._waits_no_more(self)
            self._granted.cancel()

    def started(self) -> None:
        """The answer begins, and goes on to the client whatever it is."""
        self.is_started = True
        if self._window is not None:
            self._window.started()
        self._free()
        self.forget()

    def refused(self, seconds: float) -> None:
        """The replica has no place for it, and says when there will be one."""
        window = self._free()
        if window is not None:
            window.refused()
        self.not_before = self.room.now() + seconds

    def lost(self, *, reached: bool) -> bool:
        """The replica has gone without an answer. Whether another may be asked.

        Args:
            reached: it may have had the request.
        """
        self._lost += reached
        window = self._free()
        if window is not None:
            window.rests_until = self.room.now() + REST_SECONDS
        return self._lost < MOST_LOST

    def late(self) -> Refused:
        """What it ends with when `until` has come."""
        if self.until == self.deadline:
            return Refused(Reason.DEADLINE, "the deadline passed before a replica answered")
        seconds = self.room.limits.hold_seconds
        return self.room.refuse(Reason.TIMEOUT, f"no replica took the request within {seconds:g} s")

    def _free(self) -> Window | None:
        """Its place at the replica."""
        window, self._window = self._window, None
        if window is not None:
            window.handed -= 1
            self.room._hand_over_soon()
        return window


class Room:
    """See the module.

    Attributes:
        wake: set when a request comes to wait and there is no replica. Who waits for it clears it.
        closing: set when nothing more comes in.
        changes: of replicas and progress, so far.
        outcomes: how requests ended: `answered`, `cancelled`, `failed` (what was wrong with them), or a Reason.
    """

    def __init__(self, limits: HoldLimits | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits or HoldLimits()
        self.now = clock
        self.wake = asyncio.Event()
        self.closing = asyncio.Event()
        self.outcomes: Counter[str] = Counter()
        self.held_bytes = 0
        self.changes = 0
        self._progress = Progress()
        self._windows: tuple[Window, ...] = ()
        self._entered: set[Held] = set()  # until their answers have ended
        self._waiting: list[Held] = []  # by number
        self._numbers = 0
        self._changed = asyncio.Event()
        self._timer: asyncio.Handle | None = None

    # -- for the controller ------------------------------------------------------------------------------------

    @property
    def held_requests(self) -> int:
        """That wait for a replica."""
        return len(self._waiting)

    @property
    def oldest_held_seconds(self) -> float:
        return self.now() - self._waiting[0].arrived if self._waiting else 0.0

    @property
    def replicas(self) -> tuple[Replica, ...]:
        return tuple(window.replica for window in self._windows)

    def serve(self, replicas: Sequence[Replica]) -> None:
        """These take requests from now on, and no others; none: requests wait."""
        known = {window.replica.key: window for window in self._windows}
        other = known.keys() != {replica.key for replica in replicas}
        self._windows = tuple(Window.of(replica, known.get(replica.key)) for replica in replicas)
        if self._windows:
            self._progress = Progress()
        elif known and self._waiting:
            self.wake.set()
        if other:
            self._notify()
        self._hand_over()

    def progress(self, text: str, eta: float | None = None) -> None:
        """What the first replica does: see `Progress`."""
        self._progress = Progress(text, eta, self.now())
        self._notify()

    def close(self) -> None:
        """Nothing more comes in, and what waits ends."""
        self.closing.set()
        for held in self._waiting:
            if held._granted is not None and not held._granted.done():
                held._granted.set_exception(self.closed_down())
        self._notify()

    # -- for those who ask how it goes -------------------------------------------------------------------------

    @property
    def loading(self) -> Progress:
        return self._progress

    @property
    def closed(self) -> bool:
        return self.closing.is_set()

    @property
    def words(self) -> str:
        return self._progress.words(self.now())

    async def changed(self, since: int, seconds: float) -> None:
        """Until replicas or progress are others than they were when `changes` was `since`, or so long."""
        if self.changes == since:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), seconds)

    # -- for requests ------------------------------------------------------------------------------------------

    def enter(self, deadline: float | None = None) -> Held:
        """A place for a request, which waits for nothing yet.

        Raises:
            Refused: there is none.
        """
        if self.closed:
            raise self._count(self.closed_down())
        if len(self._entered) >= self.limits.max_requests:
            waiting = f"{self.held_requests} of them wait for a replica"
            message = f"{len(self._entered)} requests are here, {waiting}, and there is no place for more"
            raise self._count(self.refuse(Reason.FULL, message))
        self._numbers += 1
        held = Held(self, self._numbers, self.now(), deadline)
        self._entered.add(held)
        return held

    def refuse(self, reason: Reason, message: str) -> Refused:
        """With the time that a replica is expected to take."""
        left = self._progress.left(self.now())
        seconds = (RETRY_UNKNOWN if left is None else left) * (1 + RETRY_SPREAD * random.random())
        low, high = RETRY_SECONDS
        return Refused(reason, f"{message}; retry later", min(max(seconds, low), high))

    def _keep(self, held: Held, size: int) -> None:
        if size > 0 and self.held_bytes + size > self.limits.max_bytes:
            message = f"requests of {self.held_bytes} bytes wait for a replica, and there is no place for {size} more"
            raise self.refuse(Reason.FULL, message)
        held.size += size
        self.held_bytes += size

    def _wait(self, held: Held, granted: asyncio.Future[Replica]) -> None:
        if self.closed:
            raise self.closed_down()
        if held not in self._waiting:
            bisect.insort(self._waiting, held, key=lambda each: each.number)
        if not self._windows and len(self._waiting) == 1:
            self.wake.set()
        self._hand_over()

    def _waits_no_more(self, held: Held) -> None:
        with suppress(ValueError):
            self._waiting.remove(held)

    def _left(self, held: Held, error: BaseException | None) -> None:
        self._entered.discard(held)
        self._keep(held, -held.size)
        if held.is_started:
            self.outcomes["answered"] += 1
        elif isinstance(error, Refused):
            self._count(error)
        elif error is None:  # the last replica's error is the answer
            self.outcomes[Reason.LOST] += 1
        else:
            self.outcomes["cancelled" if isinstance(error, asyncio.CancelledError | Gone) else "failed"] += 1

    def _count(self, error: Refused) -> Refused:
        self.outcomes[error.reason] += 1
        return error

    def closed_down(self) -> Refused:
        return Refused(Reason.CLOSING, "the activator is shutting down; retry", RETRY_SECONDS[0])

    def _notify(self) -> None:
        self.changes += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    # -- hand-over ---------------------------------------------------------------------------------------------

    def _hand_over(self) -> None:
        """To each replica what it takes now, and look again when the next rest ends."""
        now = self.now()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for held in tuple(self._waiting):
            assert held._granted is not None
            if held.not_before > now or held._granted.done():  # done: cancelled, and about to leave
                continue
            window = min((each for each in self._windows if each.takes(now)), key=lambda each: each.share, default=None)
            if window is None:
                break
            self._grant(held, window)
        rests = [each.rests_until for each in self._windows] + [each.not_before for each in self._waiting]
        if self._waiting and self._windows and (later := [each - now for each in rests if each > now]):
            self._timer = asyncio.get_running_loop().call_later(min(later), self._hand_over)

    def _grant(self, held: Held, window: Window) -> None:
        assert held._granted is not None
        self._waiting.remove(held)
        held._window = window
        window.handed += 1
        held._granted.set_result(window.replica)

    def _hand_over_soon(self) -> None:
        """When whoever gave a place back is done with it."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_soon(self._hand_over)
