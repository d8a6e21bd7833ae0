"""One of several processes leads, by a Lease of the cluster, and no other ever writes.

free ── PUT with its resourceVersion: one of those that try wins ──► ours ── renewed every 2 s ──► ours
 ▲                                                                    │
 ├─ released: holderIdentity "" ◄──────────── the process ends ───────┤
 └─ unchanged for 15 s, by the clock of whoever watches ◄── not renewed for 10 s: the holder stops acting

What keeps two from acting at the same time:

- Nobody compares its clock with another's. A lease is free when the one who wants it has *seen* it unchanged for its
  whole duration, and a holder counts from the moment *before* it asked for the renewal that succeeded. So clocks of
  machines may differ by any amount; they only have to run at about the same speed.
- A holder stops a margin earlier (`deadline`) than others may begin (`duration`). Every write goes through `fenced`,
  which asks the monotonic clock before the request goes out and gives it up where the margin ends.
- Writes that change a workload name the resourceVersion that was read, so that one which arrives late, out of a
  network that held it back, meets a newer version and is refused.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from autoscaler.clock import Clock, SystemClock
from autoscaler.cluster.face import LEASES, Cluster, ClusterError, Json, Kind, WatchEvent
from autoscaler.cluster.objects import micro_timestamp

log = logging.getLogger(__name__)

RELEASE_SECONDS = 5.0  # that the API server has to answer a process which ends


class NotLeaderError(Exception):
    """What was to be written is the leader's business, and this process does not lead (any more)."""


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """Seconds. Those of Kubernetes' own controllers."""

    duration: float = 15.0  # others may lead after the lease was not renewed for so long
    deadline: float = 10.0  # who leads stops after so long without a renewal
    retry: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.retry < self.deadline < self.duration:
            raise ValueError(f"a lease needs 0 < retry {self.retry} < deadline {self.deadline} < {self.duration}")


class Lease:
    """See the module. Belongs to one event loop.

    Args:
        identity: of this process, and of no other that ever was: a pod's name is that of its predecessor's container.
    """

    def __init__(
        self, cluster: Cluster, name: str, identity: str, times: LeaseTimes | None = None, clock: Clock | None = None
    ) -> None:
        self._cluster = cluster
        self._name = name
        self.identity = identity
        self._times = times or LeaseTimes()
        self._clock = clock or SystemClock()
        self._renewed: float | None = None  # when the request was sent that renewed it last; None: not ours
        self._seen: Json | None = None  # the latest spec that was read …
        self._seen_at = -math.inf  # … and when it was seen first

    @property
    def left(self) -> float:
        """Seconds for which this process may still act; 0 or less: it does not lead."""
        if self._renewed is None:
            return 0.0
        return self._renewed + self._times.deadline - self._clock.monotonic()

    @property
    def holder(self) -> str:
        """Who held it when it was read last; "": nobody."""
        return str((self._seen or {}).get("holderIdentity") or "")

    async def acquire(self) -> None:
        """Until this process leads."""
        while not await self._tried(self._times.deadline):
            # More often than it is renewed: after an orderly end nobody may take requests at zero until another leads
            await self._clock.sleep(self._times.retry / 2 * random.uniform(1.0, 1.2))
        log.info("leads", extra={"lease": self._name, "identity": self.identity})

    async def keep(self) -> None:
        """Renew it; returns when this process does not lead any more."""
        while self.left > 0:
            await self._clock.sleep(min(self._times.retry, self.left))
            if self.left <= 0 or (not await self._tried(self.left) and self._renewed is None):
                break
        self._renewed = None
        log.warning("leads no more", extra={"lease": self._name, "holder": self.holder})

    async def release(self) -> None:
        """Give it to whoever asks first. Where that fails the others wait for its end."""
        if self.left <= 0:
            return
        left = min(self.left, RELEASE_SECONDS)
        self._renewed = None  # from here on nothing is written, whatever becomes of the request
        try:
            async with asyncio.timeout(left):
                lease = await self._cluster.get(LEASES, self._name)
                if (lease.get("spec") or {}).get("holderIdentity") == self.identity:
                    lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1, **self._now("renewTime")}
                    await self._cluster.replace(LEASES, self._name, lease)
        except (ClusterError, TimeoutError) as error:
            log.warning("lease not released", extra={"lease": self._name, "reason": str(error)})

    @asynccontextmanager
    async def fenced(self) -> AsyncIterator[None]:
        """Around one write. Raises NotLeaderError before it, and where it takes so long that another may lead."""
        if self.left <= 0:
            raise NotLeaderError(f"{self.identity} does not hold the lease {self._name}")
        margin = self._times.duration - self._times.deadline
        try:
            async with asyncio.timeout(self.left + margin / 2):
                yield
        except TimeoutError as error:
            raise NotLeaderError(f"the lease {self._name} ended while a write was under way") from error

    async def _tried(self, seconds: float) -> bool:
        """Try to get or renew it. False where that failed: for now, or for good where `_renewed` is None then."""
        try:
            async with asyncio.timeout(seconds):
                return await self._try()
        except ClusterError as error:
            if not error.conflict:  # somebody else was first: nothing to tell
                log.warning("lease not reached", extra={"lease": self._name, "reason": str(error)})
        except TimeoutError:
            log.warning("lease not reached", extra={"lease": self._name, "reason": f"no answer in {seconds:.1f} s"})
        return False

    async def _try(self) -> bool:
        asked = self._clock.monotonic()
        try:
            lease = await self._cluster.get(LEASES, self._name)
        except ClusterError as error:
            if not error.not_found:
                raise
            return self._got(asked, await self._cluster.create(LEASES, self._body()))
        spec = lease.get("spec") or {}
        self._look(spec)
        ours = self.holder == self.identity
        if not ours:
            self._renewed = None
            if self.holder and self._clock.monotonic() < self._seen_at + self._lasts(spec):
                return False
        lease["spec"] = spec | self._claim()
        if not ours:
            lease["spec"] |= self._now("acquireTime") | {"leaseTransitions": int(spec.get("leaseTransitions") or 0) + 1}
        return self._got(asked, await self._cluster.replace(LEASES, self._name, lease))

    def _look(self, spec: Json) -> None:
        if spec != self._seen:
            self._seen, self._seen_at = spec, self._clock.monotonic()

    def _got(self, asked: float, lease: Json) -> bool:
        self._renewed = asked
        self._look(lease.get("spec") or {})
        return True

    def _lasts(self, spec: Json) -> float:
        """What its holder has promised to others; where that says nothing, what this process would."""
        return float(spec.get("leaseDurationSeconds") or self._times.duration)

    def _body(self) -> Json:
        spec = self._claim() | self._now("acquireTime") | {"leaseTransitions": 0}
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name, "namespace": self._cluster.namespace},
            "spec": spec,
        }

    def _claim(self) -> Json:
        duration = math.ceil(self._times.duration)
        return {"holderIdentity": self.identity, "leaseDurationSeconds": duration} | self._now("renewTime")

    def _now(self, field: str) -> Json:
        return {field: micro_timestamp(self._clock.wall())}


class FencedCluster:
    """`Cluster` in which this process writes while it leads, and never otherwise. Reads as before."""

    def __init__(self, cluster: Cluster, lease: Lease) -> None:
        self._cluster, self._lease = cluster, lease
        self.namespace = cluster.namespace

    async def get(self, kind: Kind, name: str, subresource: str = "") -> Json:
        return await self._cluster.get(kind, name, subresource)

    async def list(self, kind: Kind, label_selector: str = "") -> Json:
        return await self._cluster.list(kind, label_selector)

    def watch(self, kind: Kind, resource_version: str, label_selector: str = "") -> AsyncIterator[WatchEvent]:
        return self._cluster.watch(kind, resource_version, label_selector)

    async def create(self, kind: Kind, body: Json) -> Json:
        async with self._lease.fenced():
            return await self._cluster.create(kind, body)

    async def replace(self, kind: Kind, name: str, body: Json, subresource: str = "") -> Json:
        async with self._lease.fenced():
            return await self._cluster.replace(kind, name, body, subresource)

    async def patch(self, kind: Kind, name: str, patch: Mapping[str, Any], subresource: str = "") -> Json:
        async with self._lease.fenced():
            return await self._cluster.patch(kind, name, patch, subresource)
