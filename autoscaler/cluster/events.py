"""Events of a QueueAutoscaler, as `kubectl describe` shows them.

What happens again within `SERIES_SECONDS` with the same words is one Event with a count, and the count is written once
a minute at most: a fault that stays does not fill the cluster's store. Events are for people: one that cannot be
written is logged, and nothing waits for it or fails by it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from uuid import uuid4

from autoscaler.clock import Clock
from autoscaler.cluster.face import EVENTS, Cluster, ClusterError, Json
from autoscaler.cluster.objects import micro_timestamp, shortened

log = logging.getLogger(__name__)

CONTROLLER = "autoscaling.nemoserve.dev/operator"
SERIES_SECONDS = 600.0
WRITE_SECONDS = 60.0
REMEMBERED = 256  # different ones
MAX_WORD = 128  # letters, of a reason and of who reports it


@dataclass(slots=True)
class _Series:
    name: str  # of the Event
    count: int
    last: float  # when it happened
    written: float


class Recorder:
    """Writes the Events of one process.

    Args:
        instance: who it is: the pod's name.
    """

    def __init__(self, cluster: Cluster, instance: str, clock: Clock) -> None:
        self._cluster, self._instance, self._clock = cluster, instance, clock
        self._series: OrderedDict[tuple[str, str, str], _Series] = OrderedDict()

    async def record(self, about: Json, reason: str, action: str, note: str, *, warning: bool = False) -> None:
        """Something happened to an object.

        Args:
            reason, action: a word in CamelCase each: why, and what was done.
            note: for people, with the numbers.
        """
        now = self._clock.wall()
        key = (about["metadata"].get("uid", ""), reason, note)
        series = self._series.get(key)
        try:
            if series is None or now - series.last >= SERIES_SECONDS:
                await self._create(key, self._event(about, reason, action, note, warning, now), now)
            else:
                await self._again(series, now)
        except ClusterError as error:
            if error.not_found:  # tidied away meanwhile: the next time is another one
                self._series.pop(key, None)
            log.warning("event not written", extra={"reason": reason, "note": note, "error": str(error)})

    async def _create(self, key: tuple[str, str, str], event: Json, now: float) -> None:
        await self._cluster.create(EVENTS, event)
        self._series[key] = _Series(event["metadata"]["name"], 1, now, now)
        self._series.move_to_end(key)
        if len(self._series) > REMEMBERED:
            self._series.popitem(last=False)

    async def _again(self, series: _Series, now: float) -> None:
        series.count, series.last = series.count + 1, now
        if now - series.written >= WRITE_SECONDS:
            patch = {"series": {"count": series.count, "lastObservedTime": micro_timestamp(now)}}
            await self._cluster.patch(EVENTS, series.name, patch)
            series.written = now

    def _event(self, about: Json, reason: str, action: str, note: str, warning: bool, now: float) -> Json:
        metadata = about["metadata"]
        return {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {
                "name": f"{metadata['name'][:200]}.{uuid4().hex[:16]}",
                "namespace": self._cluster.namespace,
            },
            "eventTime": micro_timestamp(now),
            "reportingController": CONTROLLER,
            "reportingInstance": self._instance[:MAX_WORD],
            "regarding": {
                "apiVersion": about.get("apiVersion", ""),
                "kind": about.get("kind", ""),
                "name": metadata["name"],
                "namespace": self._cluster.namespace,
                "uid": metadata.get("uid", ""),
            },
            "type": "Warning" if warning else "Normal",
            "reason": reason[:MAX_WORD],
            "action": action,
            "note": shortened(note),
        }
