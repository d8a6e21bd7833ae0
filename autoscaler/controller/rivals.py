"""Whether somebody else scales the same workload: two that do so undo each other's work for ever.

A ScaledObject of KEDA shows by the HorizontalPodAutoscaler that it makes. Of two QueueAutoscalers the older one stays.
"""

from __future__ import annotations

import logging

from autoscaler.cluster.face import QUEUE_AUTOSCALERS, Cluster, ClusterError, Json, Kind
from autoscaler.cluster.objects import items
from autoscaler.resource import TargetRef

log = logging.getLogger(__name__)

OLDER = "QueueAutoscaler/"  # how the word for a rival of our own kind begins
HPAS = Kind("autoscaling", "v2", "horizontalpodautoscalers")


async def rival(cluster: Cluster, resource: Json, target: TargetRef) -> str | None:
    """Its kind and name; None: there is none, as far as may be seen. Raises ClusterError."""
    for each in items(await cluster.list(QUEUE_AUTOSCALERS)):
        if _scales(each, target) and _age(each) < _age(resource):
            return f"{OLDER}{each['metadata']['name']}"
    for each in await _hpas(cluster):
        if _scales(each, target):
            return f"HorizontalPodAutoscaler/{each['metadata']['name']}"
    return None


async def _hpas(cluster: Cluster) -> list[Json]:
    try:
        return list(items(await cluster.list(HPAS)))
    except ClusterError as error:
        if error.code not in (403, 404):  # it may not look, or there is no such kind
            raise
        log.debug("HorizontalPodAutoscalers not listed", extra={"reason": str(error)})
        return []


def _scales(scaler: Json, target: TargetRef) -> bool:
    ref = (scaler.get("spec") or {}).get("scaleTargetRef")
    return isinstance(ref, dict) and (ref.get("kind"), ref.get("name")) == (target.kind, target.name)


def _age(resource: Json) -> tuple[str, str]:
    """Smaller: older. Of the same second the first by name."""
    metadata = resource["metadata"]
    return metadata.get("creationTimestamp", ""), metadata["name"]
