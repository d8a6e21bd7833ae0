"""The operator's loop: one task for each QueueAutoscaler, while this process leads.

resources ── list, watch ──► names ──┬─► task of each: look ── wait ── look …       the leader alone
pods of each ─── watch ──────────────┤         ▲
a request that waits for a replica ──┘      wakes it; else it wakes by its interval

A process that does not lead watches the resources all the same, so that it can begin at once when it does. One that
leads no more stops its tasks before it tries to lead again; a write of theirs that is still under way is stopped by the
fence around every write (`autoscaler.cluster.lease`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any

from autoscaler.clock import Clock
from autoscaler.cluster.face import QUEUE_AUTOSCALERS, Cluster, ClusterError, Json, WatchEvent
from autoscaler.cluster.lease import Lease
from autoscaler.cluster.watch import Follower
from autoscaler.controller.metrics import Metrics
from autoscaler.controller.tend import Tender, running

log = logging.getLogger(__name__)


class Controller:
    """See the module. Belongs to one event loop.

    Args:
        tender: makes the one for a resource of this name, which tells by the function given that it is gone.
        bystand: what is done until this process leads, as often as it does not.
        only: names of the resources to look after; none: all.

    Attributes:
        ready: the resources are known.
    """

    def __init__(
        self,
        cluster: Cluster,
        lease: Lease,
        tender: Callable[[str, Callable[[str], None]], Tender],
        metrics: Metrics,
        clock: Clock,
        only: Collection[str] = (),
        bystand: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self._cluster, self._lease, self._metrics, self._clock = cluster, lease, metrics, clock
        self._tender, self._only, self._bystand = tender, only, bystand
        self._names: set[str] = set()
        self._generations: dict[str, int] = {}  # as they were seen last
        self._tenders: dict[str, Tender] = {}
        self._changed = asyncio.Event()  # which resources there are, or which have a task
        self.ready = False

    @property
    def leads(self) -> bool:
        return self._lease.left > 0

    async def run(self) -> None:
        """Ends by being cancelled, and gives the lease back then."""
        follower = Follower(
            self._cluster,
            QUEUE_AUTOSCALERS,
            self._clock,
            listed=self._listed,
            changed=self._seen,
            failed=self._failed,
        )
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(follower.run())
                group.create_task(self._stand())
        finally:
            await self._lease.release()

    # -- which resources there are -------------------------------------------------------------------------------

    def _listed(self, resources: Sequence[Json]) -> None:
        self._names = {name for each in resources if self._is_ours(name := each["metadata"]["name"])}
        self.ready = True
        self._changed.set()

    def _seen(self, event: WatchEvent) -> None:
        name, generation = event.object["metadata"]["name"], event.object["metadata"].get("generation", 0)
        if event.type == "DELETED":
            self._names.discard(name)
            self._generations.pop(name, None)
        elif self._is_ours(name):
            self._names.add(name)
            if self._generations.get(name) == generation:
                return  # its status alone has changed, which is our own doing
            self._generations[name] = generation
        if name in self._tenders:
            self._tenders[name].wake()
        self._changed.set()

    def _gone(self, name: str) -> None:
        self._names.discard(name)

    def _is_ours(self, name: str) -> bool:
        return not self._only or name in self._only

    def _failed(self, error: ClusterError) -> None:
        self._metrics.api_errors.labels(str(error.code)).inc()

    # -- leading -------------------------------------------------------------------------------------------------

    async def _stand(self) -> None:
        while True:
            async with AsyncExitStack() as meanwhile:
                if self._bystand is not None:
                    await meanwhile.enter_async_context(running(self._bystand()))
                await self._lease.acquire()
            self._metrics.leader.set(1)
            acting, keeping = asyncio.create_task(self._act()), asyncio.create_task(self._lease.keep())
            try:
                await asyncio.wait({acting, keeping}, return_when=asyncio.FIRST_COMPLETED)
                if acting.done():
                    acting.result()  # a fault of ours: who leads and does not act is in the way of others
            finally:
                self._metrics.leader.set(0)
                for task in (acting, keeping):
                    task.cancel()
                await asyncio.gather(acting, keeping, return_exceptions=True)

    async def _act(self) -> None:
        """A task for each resource, until this one is cancelled."""
        tasks: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                self._changed.clear()
                for name in sorted(self._names):
                    if name not in tasks or tasks[name].done():
                        tasks[name] = self._tend(name)
                await self._changed.wait()
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
            self._tenders.clear()

    def _tend(self, name: str) -> asyncio.Task[None]:
        self._tenders[name] = tender = self._tender(name, self._gone)
        task = asyncio.create_task(tender.run(), name=f"tend {name}")
        task.add_done_callback(lambda task: self._changed.set())
        return task
