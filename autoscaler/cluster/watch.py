"""Changes of a kind of object, for ever: list, watch from there, resume, list anew when that is too long ago.

A watch makes the operator quick, never right: whoever follows it looks at everything itself from time to time. So a
change that is seen late, or twice, or never costs an interval and no more.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Sequence

from autoscaler.clock import Clock
from autoscaler.cluster.face import Cluster, ClusterError, Json, Kind, WatchEvent
from autoscaler.cluster.objects import items

log = logging.getLogger(__name__)

RELIST_SECONDS = 300.0  # a list finds what a watch may have lost
FIRST_PAUSE = 0.25
LONGEST_PAUSE = 30.0
LONGEST_ASKED = 60.0  # that a server may ask to wait: a proxy's word of an hour is not followed for so long


def pause(failures: int, retry_after: float | None = None) -> float:
    """Seconds before the next try after so many failures in a row: doubled each time, with jitter so that those who
    failed together do not come back together; and no less than the server asks for, within reason."""
    seconds = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(failures - 1, 20))
    return max(min(retry_after or 0.0, LONGEST_ASKED), seconds) * random.uniform(1.0, 1.5)


class Follower:
    """Follows the objects of a kind in one namespace.

    Args:
        listed: called with all objects there are, whenever they were listed.
        changed: called with each change after that.
        failed: called with each error.
    """

    def __init__(
        self,
        cluster: Cluster,
        kind: Kind,
        clock: Clock,
        *,
        listed: Callable[[Sequence[Json]], None],
        changed: Callable[[WatchEvent], None],
        failed: Callable[[ClusterError], None],
        label_selector: str = "",
    ) -> None:
        self._cluster, self._kind, self._clock = cluster, kind, clock
        self._listed, self._changed, self._failed = listed, changed, failed
        self._selector = label_selector
        self._version: str | None = None  # from which to watch; None: list first
        self._listed_at = 0.0

    async def run(self) -> None:
        """Ends by being cancelled alone."""
        failures = 0
        while True:
            before = self._clock.monotonic()
            error = await self._attempt(self._follow_once)
            if error is None and self._clock.monotonic() - before >= 1.0:
                failures = 0  # the server ended the watch when its time had come
                continue
            if error is not None and error.expired:
                self._version = None
            failures += 1
            await self._clock.sleep(pause(failures, error.retry_after if error is not None else None))

    async def _attempt(self, step: Callable[[], Awaitable[None]]) -> ClusterError | None:
        try:
            await step()
        except ClusterError as error:
            level = logging.INFO if error.expired else logging.WARNING
            log.log(level, "watch ended", extra={"kind": self._kind.plural, "reason": str(error)})
            self._failed(error)
            return error
        return None

    async def _follow_once(self) -> None:
        """One list where it is time for one, and one watch."""
        now = self._clock.monotonic()
        if self._version is None or now - self._listed_at >= RELIST_SECONDS:
            found = await self._cluster.list(self._kind, self._selector)
            self._version, self._listed_at = found["metadata"]["resourceVersion"], now
            self._listed(items(found))
        async for event in self._cluster.watch(self._kind, self._version, self._selector):
            self._version = event.object["metadata"]["resourceVersion"]
            if event.type != "BOOKMARK":
                self._changed(event)
