"""Small objects, as tests post them to an API server."""

from __future__ import annotations

from typing import Any

from autoscaler.cluster import objects
from autoscaler.cluster.face import Json


def workload(name: str = "nemo", replicas: int | None = 2, kind: str = "Deployment", **more: Any) -> Json:
    """One whose pods no node takes."""
    labels = {"app": name}
    gates = [{"name": "nemoserve.dev/never"}]
    pod = {"containers": [{"name": "server", "image": "nowhere.invalid/server"}], "schedulingGates": gates}
    spec: Json = {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": pod}}
    if replicas is not None:
        spec["replicas"] = replicas
    if kind == "StatefulSet":
        spec["serviceName"] = name
    return {"kind": kind, "apiVersion": "apps/v1", "metadata": {"name": name, "labels": labels}, "spec": spec | more}


def scaler(name: str = "nemo", **spec: Any) -> Json:
    target = {"kind": "Deployment", "name": name}
    head = {"kind": "QueueAutoscaler", "apiVersion": "autoscaling.nemoserve.dev/v1alpha1", "metadata": {"name": name}}
    return head | {"spec": {"scaleTargetRef": target, "maxReplicas": 4} | spec}


def lease(name: str = "lock", **spec: Any) -> Json:
    return {"metadata": {"name": name}, "spec": {"holderIdentity": "a", "leaseDurationSeconds": 15} | spec}


def pod(name: str, **labels: str) -> Json:
    spec = workload()["spec"]["template"]["spec"]
    return {"metadata": {"name": name, "labels": labels}, "spec": spec}


def event(**fields: Any) -> Json:
    whole = {
        "metadata": {"generateName": "nemo."},
        "eventTime": objects.micro_timestamp(1_790_000_000),
        "reportingController": "nemoserve.dev/autoscaler",
        "reportingInstance": "autoscaler-0",
        "action": "Scale",
        "reason": "ScaledOut",
        "type": "Normal",
        "note": "2 -> 3",
    }
    return whole | fields
