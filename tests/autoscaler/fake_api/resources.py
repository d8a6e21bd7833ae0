"""The kinds of object that the fake knows, and what is special about each. Custom ones come from their CRD."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.autoscaler.fake_api.errors import Json, bad_request

Faults = list[tuple[str, str]]  # (field, what is wrong with it)
Prepare = Callable[[Json], None]  # fill in defaults, in place
Check = Callable[[Json, Json | None], Faults]  # of a new object, and the one that it replaces

QUALIFIED = re.compile(r"([a-z0-9.-]+/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
# Fields of an event that stay as they were
FIXED = [
    *("regarding", "reason", "note", "type", "eventTime", "action", "related"),
    *("reportingController", "reportingInstance"),
]
MICRO_TIME = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)$")


@dataclass(frozen=True, slots=True)
class ScalePaths:
    """`selector`: of the text, in a custom resource; None: it is spec.selector, as in a Deployment."""

    replicas: str = ".spec.replicas"
    observed: str = ".status.replicas"
    selector: str | None = None


@dataclass(frozen=True, slots=True)
class Resource:
    """Attributes:
    status: has a status subresource.
    generation: counts changes of what is wanted.
    unconditional: a PUT may leave out the resourceVersion.
    upsert: a PUT creates what is not there.
    custom: is one: no strategic merge, `kind` in the items of lists, pruned.
    fields: that field selectors know, besides name and namespace.
    columns: `additionalPrinterColumns`.
    """

    group: str
    version: str
    plural: str
    kind: str
    short_names: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    namespaced: bool = True
    status: bool = False
    scale: ScalePaths | None = None
    generation: bool = False
    unconditional: bool = True
    upsert: bool = False
    custom: bool = False
    fields: tuple[str, ...] = ()
    columns: tuple[Json, ...] = ()
    prepare: Prepare = lambda item: None
    check: Check = lambda new, old: []

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def qualified(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def qualified_kind(self) -> str:
        return f"{self.kind}.{self.group}" if self.group else self.kind


def built_in() -> tuple[Resource, ...]:
    apps: dict[str, Any] = {"status": True, "generation": True, "scale": ScalePaths(), "prepare": _prepare_workload}
    apps |= {"categories": ("all",)}
    rbac = "rbac.authorization.k8s.io"
    return (
        Resource("", "v1", "namespaces", "Namespace", ("ns",), namespaced=False, status=True),
        Resource("", "v1", "nodes", "Node", ("no",), namespaced=False, status=True),
        Resource(
            "",
            "v1",
            "pods",
            "Pod",
            ("po",),
            ("all",),
            status=True,
            generation=True,
            fields=("spec.nodeName", "status.phase", "status.podIP"),
            prepare=_prepare_pod,
            check=_check_pod,
        ),
        Resource("", "v1", "services", "Service", ("svc",), ("all",), status=True),
        Resource("", "v1", "serviceaccounts", "ServiceAccount", ("sa",)),
        Resource("", "v1", "configmaps", "ConfigMap", ("cm",)),
        Resource("", "v1", "secrets", "Secret"),
        Resource("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget", ("pdb",), status=True),
        Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy", ("netpol",)),
        Resource("apps", "v1", "deployments", "Deployment", ("deploy",), check=_check_workload, **apps),
        Resource("apps", "v1", "statefulsets", "StatefulSet", ("sts",), check=_check_workload, **apps),
        Resource("apps", "v1", "replicasets", "ReplicaSet", ("rs",), check=_check_workload, **apps),
        Resource("autoscaling", "v2", "horizontalpodautoscalers", "HorizontalPodAutoscaler", ("hpa",), status=True),
        Resource("coordination.k8s.io", "v1", "leases", "Lease", unconditional=False, upsert=True, check=_check_lease),
        Resource("events.k8s.io", "v1", "events", "Event", ("ev",), fields=("reason", "type"), check=_check_event),
        Resource(rbac, "v1", "roles", "Role"),
        Resource(rbac, "v1", "rolebindings", "RoleBinding"),
        Resource(rbac, "v1", "clusterroles", "ClusterRole", namespaced=False),
        Resource(rbac, "v1", "clusterrolebindings", "ClusterRoleBinding", namespaced=False),
        Resource(
            "apiextensions.k8s.io",
            "v1",
            "customresourcedefinitions",
            "CustomResourceDefinition",
            ("crd", "crds"),
            namespaced=False,
            status=True,
            generation=True,
            unconditional=False,
        ),
    )


def _prepare_workload(item: Json) -> None:
    spec = item.setdefault("spec", {})
    if spec.get("replicas") is None:
        spec["replicas"] = 1
    spec.setdefault("template", {}).setdefault("spec", {}).setdefault("terminationGracePeriodSeconds", 30)


def _check_workload(new: Json, old: Json | None) -> Faults:
    spec = new["spec"]
    faults: Faults = []
    replicas = spec["replicas"]
    if not isinstance(replicas, int) or isinstance(replicas, bool):
        raise bad_request(f'{new["kind"]} in version "v1" cannot be handled: spec.replicas is no int32: {replicas!r}')
    if replicas < 0:
        faults.append(("spec.replicas", f"Invalid value: {replicas}: must be greater than or equal to 0"))
    wanted = (spec.get("selector") or {}).get("matchLabels") or {}
    labels = spec["template"].get("metadata", {}).get("labels") or {}
    if not spec.get("selector"):
        faults.append(("spec.selector", "Required value"))
    elif any(labels.get(key) != value for key, value in wanted.items()):
        what = f"Invalid value: {labels}: `selector` does not match template `labels`"
        faults.append(("spec.template.metadata.labels", what))
    if old is not None and old["spec"]["selector"] != spec.get("selector"):
        faults.append(("spec.selector", f"Invalid value: {spec.get('selector')}: field is immutable"))
    return faults


def _prepare_pod(item: Json) -> None:
    item.setdefault("spec", {}).setdefault("terminationGracePeriodSeconds", 30)
    item.setdefault("status", {}).setdefault("phase", "Pending")


def _check_pod(new: Json, old: Json | None) -> Faults:
    faults: Faults = []
    if not new["spec"].get("containers"):
        faults.append(("spec.containers", "Required value"))
    cost = (new["metadata"].get("annotations") or {}).get("controller.kubernetes.io/pod-deletion-cost", "0")
    if not re.fullmatch(r"0|-?[1-9]\d{0,9}", cost):
        where = "metadata.annotations[controller.kubernetes.io/pod-deletion-cost]"
        faults.append((where, f'Invalid value: "{cost}": must be a 32bit integer'))
    if old is not None and old["spec"] != new["spec"]:
        faults.append(("spec", "Forbidden: pod updates may not change fields other than a few that are not kept here"))
    return faults


def _check_lease(new: Json, old: Json | None) -> Faults:
    spec = new.get("spec") or {}
    _micro_times(new, spec, "acquireTime", "renewTime")
    duration, transitions = spec.get("leaseDurationSeconds"), spec.get("leaseTransitions")
    faults: Faults = []
    if duration is not None and duration <= 0:
        faults.append(("spec.leaseDurationSeconds", f"Invalid value: {duration}: must be greater than 0"))
    if transitions is not None and transitions < 0:
        faults.append(("spec.leaseTransitions", f"Invalid value: {transitions}: must be greater than or equal to 0"))
    return faults


def _check_event(new: Json, old: Json | None) -> Faults:
    if not new.get("eventTime"):
        return [("eventTime", "Required value")]
    _micro_times(new, new, "eventTime")
    faults: Faults = []
    for field, most in (("reportingController", None), ("reportingInstance", 128), ("action", 128), ("reason", 128)):
        value = new.get(field) or ""
        if not value:
            faults.append((field, "Required value"))
        elif most is not None and len(value) > most:
            faults.append((field, f'Invalid value: "": can have at most {most} characters'))
    if not QUALIFIED.fullmatch(new.get("reportingController") or "none"):
        faults.append(("reportingController", "Invalid value: name part must consist of alphanumeric characters"))
    if new.get("type") not in ("Normal", "Warning"):
        faults.append(("type", f'Invalid value: "": has invalid value: {new.get("type", "")}'))
    if len((new.get("note") or "").encode()) > 1024:  # its name within the server is message
        faults.append(("message", 'Invalid value: "": can have at most 1024 characters'))
    namespace = new["metadata"]["namespace"]
    if not (new.get("regarding") or {}).get("namespace") and namespace not in ("default", "kube-system"):
        faults.append(("involvedObject.namespace", 'Invalid value: "": does not match event.namespace'))
    if "series" in new and new["series"].get("count", 0) < 2:
        faults.append(("series.count", 'Invalid value: "": should be at least 2'))
    changed = [field for field in FIXED if old is not None and old.get(field) != new.get(field)]
    return faults + [(field, f"Invalid value: {new.get(field)}: field is immutable") for field in changed]


def _micro_times(item: Json, fields: Json, *names: str) -> None:
    """kube-apiserver's decoder asks for six digits after the point."""
    for name in names:
        value = fields.get(name)
        if value is not None and not MICRO_TIME.match(str(value)):
            layout = "2006-01-02T15:04:05.000000Z07:00"
            text = f'parsing time "{value}" as "{layout}": cannot parse as "{layout}"'
            raise bad_request(f'{item["kind"]} in version "v1" cannot be handled as a {item["kind"]}: {text}')
