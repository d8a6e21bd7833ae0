"""The face of a cluster that the operator needs: what it reads, what it may change, and how that fails.

One implementation talks to an API server (`autoscaler.cluster.client`). Everything above depends on this face alone.
Objects are JSON as the API server has them; `autoscaler.cluster.objects` reads what the operator wants to know of them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Json = dict[str, Any]


class ClusterError(Exception):
    """The API server refused, or was not reached.

    Attributes:
        code: HTTP status; 0 where there was no answer.
        reason: of the `Status` object: `Conflict`, `NotFound`, `Expired`, `TooManyRequests` …
        retry_after: seconds that the server asks to wait; None: it did not say.
    """

    def __init__(self, code: int, reason: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(f"{code} {reason}: {message}")
        self.code, self.reason, self.retry_after = code, reason, retry_after

    @property
    def not_found(self) -> bool:
        return self.code == 404

    @property
    def conflict(self) -> bool:
        return self.code == 409

    @property
    def expired(self) -> bool:
        """A watch or list that started too long ago: list again."""
        return self.code == 410


@dataclass(frozen=True, slots=True)
class Kind:
    """Where objects of a kind live: /apis/{group}/{version}/namespaces/{namespace}/{plural}."""

    group: str  # "" for the core
    version: str
    plural: str


PODS = Kind("", "v1", "pods")
EVENTS = Kind("events.k8s.io", "v1", "events")
LEASES = Kind("coordination.k8s.io", "v1", "leases")
DEPLOYMENTS = Kind("apps", "v1", "deployments")
STATEFUL_SETS = Kind("apps", "v1", "statefulsets")
QUEUE_AUTOSCALERS = Kind("autoscaling.nemoserve.dev", "v1alpha1", "queueautoscalers")


@dataclass(frozen=True, slots=True)
class WatchEvent:
    type: str  # ADDED, MODIFIED, DELETED, BOOKMARK
    object: Json


class Cluster(Protocol):
    """One namespace of a cluster. Every method raises ClusterError, and none waits longer than it was given."""

    namespace: str

    async def get(self, kind: Kind, name: str, subresource: str = "") -> Json: ...

    async def list(self, kind: Kind, label_selector: str = "") -> Json:
        """The list object: `items`, and `metadata.resourceVersion` to watch from. Of pods as much as `PodList` has."""

    async def create(self, kind: Kind, body: Json) -> Json: ...

    async def replace(self, kind: Kind, name: str, body: Json, subresource: str = "") -> Json:
        """PUT: 409 where the body's resourceVersion is not the newest."""

    async def patch(self, kind: Kind, name: str, patch: Mapping[str, Any], subresource: str = "") -> Json:
        """JSON merge patch; 409 where it names a resourceVersion that is not the newest."""

    def watch(self, kind: Kind, resource_version: str, label_selector: str = "") -> AsyncIterator[WatchEvent]:
        """Changes from there on; ends when the server ends it. ClusterError with `expired`: the start is too old."""
