"""One resource is looked at again and again: when something wakes it, and at the latest when its policy wants to."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from autoscaler.clock import Clock
from autoscaler.cluster.face import PODS, Cluster, ClusterError
from autoscaler.cluster.lease import NotLeaderError
from autoscaler.cluster.watch import Follower, pause
from autoscaler.controller.front import Front
from autoscaler.controller.metrics import Metrics
from autoscaler.controller.reconcile import GoneError, Reconciler
from autoscaler.resource import InvalidSpecError

log = logging.getLogger(__name__)

SHORTEST_SECONDS = 0.5  # between two looks, however much happens
HAND_OVER_SECONDS = 5.0  # between two looks of who does not lead, while requests are held


class Tender:
    """Of one resource, while this process leads. Its pods are watched too, once it is known which they are.

    Args:
        gone: called when the resource is no more, just before `run` ends.
    """

    def __init__(
        self,
        reconciler: Reconciler,
        cluster: Cluster,
        metrics: Metrics,
        clock: Clock,
        *,
        front: Front | None,
        gone: Callable[[str], None],
        shortest: float = SHORTEST_SECONDS,
    ) -> None:
        self._reconciler, self._cluster, self._metrics, self._clock = reconciler, cluster, metrics, clock
        self._front = front if front is not None and front.autoscaler == reconciler.name else None
        self._gone = gone
        self._shortest = shortest
        self._woken = asyncio.Event()
        self._failures = 0
        self._pods: asyncio.Task[None] | None = None
        self._selector = ""  # of the pods that are watched

    def wake(self) -> None:
        """Something has changed."""
        self._woken.set()

    async def run(self) -> None:
        """Until the resource is gone."""
        async with AsyncExitStack() as tasks:
            if self._front is not None:
                await tasks.enter_async_context(running(self._wake_by_requests(self._front)))
            try:
                while await self._turn():
                    pass
            finally:
                if self._pods is not None:
                    self._pods.cancel()
                await self._reconciler.close()

    async def _turn(self) -> bool:
        """One look, and the wait after it. False: there is nothing to look at any more."""
        self._woken.clear()
        began = self._clock.monotonic()
        with self._metrics.reconcile_seconds.labels(self._reconciler.name).time():
            result, seconds = await self._look()
        self._metrics.reconciles.labels(self._reconciler.name, result).inc()
        if result == "gone" and not self._woken.is_set():  # else it may have been made anew
            if await self._end():
                return False
            self._failures += 1
            await self._clock.sleep(pause(self._failures))
            return True
        if result == "ok":
            self._watch_pods()
            await self._clock.wait(self._woken, seconds)
            await self._clock.sleep(max(0.0, self._shortest - (self._clock.monotonic() - began)))
        else:
            await self._clock.sleep(seconds)
        return True

    async def _look(self) -> tuple[str, float]:
        """How it went, and seconds to wait."""
        name = self._reconciler.name
        after: float | None = None
        try:
            seconds = await self._reconciler.look()
            self._failures = 0
            return "ok", seconds
        except GoneError:
            return "gone", self._shortest
        except NotLeaderError as error:
            result = "fenced"
            log.warning("look stopped", extra={"autoscaler": name, "reason": str(error)})
        except ClusterError as error:
            self._metrics.api_errors.labels(str(error.code)).inc()
            result, after = "conflict" if error.conflict else "error", error.retry_after
            level = logging.INFO if error.conflict else logging.WARNING
            log.log(level, "look failed", extra={"autoscaler": name, "reason": str(error)})
        except Exception:  # of ours: the other resources go on, and this one is tried again
            result = "error"
            log.exception("look failed", extra={"autoscaler": name})
        self._failures += 1
        return result, pause(self._failures, after)

    async def _end(self) -> bool:
        """Whether all that was begun is tidied up."""
        name = self._reconciler.name
        log.info("resource gone", extra={"autoscaler": name})
        self._gone(name)
        try:
            await self._reconciler.end()
            return True
        except (ClusterError, NotLeaderError) as error:
            log.warning("not tidied up yet", extra={"autoscaler": name, "reason": str(error)})
            return False

    def _watch_pods(self) -> None:
        if (selector := self._reconciler.selector) == self._selector:
            return
        if self._pods is not None:
            self._pods.cancel()
        follower = Follower(
            self._cluster,
            PODS,
            self._clock,
            listed=lambda pods: self.wake(),
            changed=lambda event: self.wake(),
            failed=lambda error: self._metrics.api_errors.labels(str(error.code)).inc(),
            label_selector=selector,
        )
        self._pods, self._selector = asyncio.create_task(follower.run()), selector

    async def _wake_by_requests(self, front: Front) -> None:
        while True:
            await front.room.wake.wait()
            front.room.wake.clear()
            self.wake()


async def hand_over(front: Front, reconciler: Reconciler, clock: Clock) -> None:
    """While another process leads: requests that came here all the same still get to a replica."""
    while True:
        await clock.wait(front.room.wake, HAND_OVER_SECONDS)
        front.room.wake.clear()
        if front.room.held_requests:
            try:
                await reconciler.hand_over()
            except (ClusterError, GoneError, InvalidSpecError, ValueError) as error:
                log.warning(
                    "held requests not handed over", extra={"autoscaler": front.autoscaler, "reason": str(error)}
                )
        await clock.sleep(SHORTEST_SECONDS)


@asynccontextmanager
async def running(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Alongside what is within; cancelled at its end."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
