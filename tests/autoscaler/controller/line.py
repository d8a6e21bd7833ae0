"""A process's line to the API server, which a test cuts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from autoscaler.cluster.face import Cluster, ClusterError, Json, Kind, WatchEvent


class Line:
    """`Cluster` that is not reached while it is not `up`."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.namespace = cluster.namespace
        self.up = True
        self.busy = 0  # calls under way, without watches
        self.answering: Callable[[], None] = lambda: None  # called when an answer is there and not yet given

    def _through(self) -> Cluster:
        if not self.up:
            raise ClusterError(0, "Unreachable", "the line is cut")
        return self._cluster

    async def _call(self, call: Callable[[Cluster], Awaitable[Json]]) -> Json:
        self.busy += 1
        try:
            answer = await call(self._through())
            self.answering()
            return answer
        finally:
            self.busy -= 1

    async def get(self, kind: Kind, name: str, subresource: str = "") -> Json:
        return await self._call(lambda cluster: cluster.get(kind, name, subresource))

    async def list(self, kind: Kind, label_selector: str = "") -> Json:
        return await self._call(lambda cluster: cluster.list(kind, label_selector))

    async def create(self, kind: Kind, body: Json) -> Json:
        return await self._call(lambda cluster: cluster.create(kind, body))

    async def replace(self, kind: Kind, name: str, body: Json, subresource: str = "") -> Json:
        return await self._call(lambda cluster: cluster.replace(kind, name, body, subresource))

    async def patch(self, kind: Kind, name: str, patch: Mapping[str, Any], subresource: str = "") -> Json:
        return await self._call(lambda cluster: cluster.patch(kind, name, patch, subresource))

    async def watch(self, kind: Kind, resource_version: str, label_selector: str = "") -> AsyncIterator[WatchEvent]:
        async for event in self._through().watch(kind, resource_version, label_selector):
            self._through()
            yield event
