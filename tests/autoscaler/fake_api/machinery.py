"""What kube-apiserver does to an object between the request and the store: names, versions, generations, subresources.

create ─ name, namespace ─ defaults ─ schema ─ checks ─ uid, generation 1 ─► stored
PUT, patch ─► object as it would be ─ precondition ─ the part that may change ─ schema ─ checks ─ generation ─► stored
                                                                        └─ nothing changed: same resourceVersion
delete ─ precondition ─ finalizers, or a pod's grace: deletionTimestamp ─► stored, and gone when they are over
"""

from __future__ import annotations

import copy
import random
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from tests.autoscaler.fake_api import errors, selectors
from tests.autoscaler.fake_api.errors import Json
from tests.autoscaler.fake_api.resources import Resource, ScalePaths, built_in
from tests.autoscaler.fake_api.schema import Definition
from tests.autoscaler.fake_api.selectors import value_at
from tests.autoscaler.fake_api.store import Store

LETTERS = "bcdfghjklmnpqrstvwxz2456789"  # of generated names
KEPT = (
    "uid",
    "name",
    "namespace",
    "creationTimestamp",
    "generation",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
)

Alter = Callable[[Json], Json]  # the object as stored -> as it is wanted


class Machinery:
    """Reads and writes of objects by name of their kind. `clock`: Unix seconds."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self.store = store
        self._clock = clock
        self._resources = {(each.group, each.plural): each for each in built_in()}
        self._definitions: dict[tuple[str, str], Definition] = {}
        for name in ("default", "kube-system"):
            self.create(self.resource("", "namespaces"), "", {"metadata": {"name": name}})

    @property
    def resources(self) -> list[Resource]:
        return list(self._resources.values())

    def resource(self, group: str, plural: str, version: str | None = None) -> Resource:
        found = self._resources.get((group, plural))
        if found is None or version not in (None, found.version):
            raise errors.no_such_resource()
        return found

    def create(
        self, resource: Resource, namespace: str, body: Json, *, dry_run: bool = False, strict: bool = False
    ) -> Json:
        item = self._typed(resource, copy.deepcopy(body))
        meta = item.setdefault("metadata", {})
        if meta.get("resourceVersion"):
            raise errors.ApiError(500, "", "resourceVersion should not be set on objects to be created")
        self._place(resource, meta, namespace)
        if resource.status:
            item.pop("status", None)
        item = self._admitted(resource, item, None, strict=strict)
        if self.store.find(resource, namespace, meta["name"]) is not None:
            raise errors.already_exists(resource.qualified, meta["name"])
        meta |= {"uid": str(uuid.uuid4()), "creationTimestamp": self.now()}
        if resource.generation:
            meta["generation"] = 1
        if resource.plural == "customresourcedefinitions":
            self._define(item)
        return item if dry_run else self.store.put(resource, item)

    def update(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        alter: Alter,
        subresource: str = "",
        *,
        is_patch: bool = False,
        dry_run: bool = False,
        strict: bool = False,
    ) -> Json:
        """Returns the object, or its `Scale` where that was changed. A patch has what it leaves out from the object."""
        old = self.store.get(resource, namespace, name)
        if subresource == "scale":
            paths = self.scale_paths(resource)
            wanted = alter(scale_of(resource, paths, old))
            self._precondition(resource, old, wanted, unconditional=True)
            new = _rescaled(paths, old, wanted)
        else:
            if subresource == "status" and not resource.status:
                raise errors.no_such_resource()
            new = self._typed(resource, copy.deepcopy(alter(old)))
            self._precondition(resource, old, new, unconditional=resource.unconditional, is_patch=is_patch)
            new = _kept(resource, old, new, subresource)
        new = self._admitted(resource, new, old, strict=strict)
        if resource.generation and _wanted(resource, old) != _wanted(resource, new):
            new["metadata"]["generation"] += 1
        new["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"]
        if new != old and not dry_run:
            if resource.plural == "customresourcedefinitions":
                self._define(new)
            new = self.store.put(resource, new)
            if _is_over(new):
                self.store.remove(resource, new)
        return scale_of(resource, self.scale_paths(resource), new) if subresource == "scale" else new

    def delete(self, resource: Resource, namespace: str, name: str, options: Json, *, dry_run: bool = False) -> Json:
        """The object, if it stays for a while, else the `Status` that says it is gone."""
        item = self.store.get(resource, namespace, name)
        wanted = {
            "metadata": {"resourceVersion": item["metadata"]["resourceVersion"]} | (options.get("preconditions") or {})
        }
        self._precondition(resource, item, wanted, unconditional=True)
        grace = _grace(resource, item, options.get("gracePeriodSeconds"))
        if not dry_run:
            if item["metadata"].get("finalizers") or grace > 0:
                return self._begin_delete(resource, item, grace)
            if resource.plural == "namespaces":
                self._empty(name)
            self.store.remove(resource, item)
            if resource.plural == "customresourcedefinitions":
                self._undefine(item)
        details = {"name": name, "group": resource.group, "kind": resource.plural, "uid": item["metadata"]["uid"]}
        return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}

    def scale(self, resource: Resource, namespace: str, name: str) -> Json:
        item = self.store.get(resource, namespace, name)
        paths = self.scale_paths(resource)
        if value_at(item, _parts(paths.replicas)) is None:
            raise errors.ApiError(500, "InternalError", f'the spec replicas field "{paths.replicas}" does not exist')
        return scale_of(resource, paths, item)

    def scale_paths(self, resource: Resource) -> ScalePaths:
        if resource.scale is None:
            raise errors.no_such_resource()
        return resource.scale

    def now(self, ahead: float = 0.0) -> str:
        return datetime.fromtimestamp(self._clock() + ahead, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    # -- what every write goes through -------------------------------------------------------------------------

    def _typed(self, resource: Resource, item: Json) -> Json:
        for field, value in (("apiVersion", resource.api_version), ("kind", resource.kind)):
            if item.setdefault(field, value) != value:
                raise errors.bad_request(
                    f"the {field} in the data ({item[field]}) does not match the expected ({value})"
                )
        return item

    def _place(self, resource: Resource, meta: Json, namespace: str) -> None:
        if not meta.get("name"):
            if not meta.get("generateName"):
                raise errors.invalid(
                    resource.qualified_kind, "", [("name", "Required value: name or generateName is required")]
                )
            meta["name"] = meta["generateName"] + "".join(random.choices(LETTERS, k=5))
        if not resource.namespaced:
            return
        if meta.setdefault("namespace", namespace) != namespace:
            raise errors.bad_request(
                "the namespace of the provided object does not match the namespace sent on the request"
            )
        self.store.get(self.resource("", "namespaces"), "", namespace)

    def _precondition(
        self, resource: Resource, old: Json, new: Json, *, unconditional: bool, is_patch: bool = False
    ) -> None:
        """A body's uid and resourceVersion say what it means to change."""
        meta, name = new.get("metadata") or {}, old["metadata"]["name"]
        if meta.get("name", name) != name:
            raise errors.bad_request(
                f"the name of the object ({meta['name']}) does not match the name on the URL ({name})"
            )
        uid = old["metadata"]["uid"]
        wanted = meta.get("uid") or uid
        if wanted != uid and not is_patch:
            why = f"Precondition failed: UID in precondition: {wanted}, UID in object meta: {uid}"
            raise errors.conflict(resource.qualified, name, why)
        version = meta.get("resourceVersion")
        if not version and not unconditional:
            what = "Invalid value: 0x0: must be specified for an update"
            raise errors.invalid(resource.qualified_kind, name, [("metadata.resourceVersion", what)])
        if version and version != old["metadata"]["resourceVersion"]:
            raise errors.conflict(resource.qualified, name, errors.STALE)
        if wanted != uid:
            what = f'Invalid value: "{wanted}": field is immutable'
            raise errors.invalid(resource.qualified_kind, name, [("metadata.uid", what)])

    def _admitted(self, resource: Resource, item: Json, old: Json | None, *, strict: bool) -> Json:
        name = item["metadata"].get("name", "")
        if definition := self._definitions.get((resource.group, resource.plural)):
            item = definition.admit(item, old, strict=strict)
        resource.prepare(item)
        if faults := resource.check(item, old):
            raise errors.invalid(resource.qualified_kind, name, faults)
        return item

    # -- the end of objects, and of kinds ----------------------------------------------------------------------

    def _begin_delete(self, resource: Resource, item: Json, grace: int) -> Json:
        meta = item["metadata"]
        if meta.get("deletionTimestamp") and grace >= meta.get("deletionGracePeriodSeconds", 0):
            return item
        ending = {"deletionTimestamp": self.now(grace), "deletionGracePeriodSeconds": grace}
        if "generation" in meta:
            ending["generation"] = meta["generation"] + 1
        return self.store.put(resource, item | {"metadata": meta | ending})

    def _empty(self, namespace: str) -> None:
        for resource in self.resources:
            for item in self.store.list(resource, namespace) if resource.namespaced else ():
                self.store.remove(resource, item)

    def _define(self, item: Json) -> None:
        definition = Definition(item)
        self._definitions[definition.resource.group, definition.resource.plural] = definition
        self._resources[definition.resource.group, definition.resource.plural] = definition.resource
        established = {"type": "Established", "status": "True", "reason": "InitialNamesAccepted"}
        item["status"] = {"conditions": [established | {"lastTransitionTime": self.now(), "message": ""}]}

    def _undefine(self, item: Json) -> None:
        key = item["spec"]["group"], item["spec"]["names"]["plural"]
        resource = self._resources[key]
        for each in self.store.list(resource):
            self.store.remove(resource, each)
        del self._resources[key], self._definitions[key]


def scale_of(resource: Resource, paths: ScalePaths, item: Json) -> Json:
    """The `Scale` of an object, without `replicas` where that is 0, as Go leaves out what is empty."""
    meta = item["metadata"]
    replicas = value_at(item, _parts(paths.replicas))
    if paths.selector is None:
        selector: Any = selectors.text_of(item["spec"]["selector"])
    else:
        selector = value_at(item, _parts(paths.selector))
    status = {"replicas": value_at(item, _parts(paths.observed)) or 0} | ({"selector": selector} if selector else {})
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {key: meta[key] for key in ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")},
        "spec": {"replicas": replicas} if replicas else {},
        "status": status,
    }


def _rescaled(paths: ScalePaths, old: Json, wanted: Json) -> Json:
    replicas = (wanted.get("spec") or {}).get("replicas", 0)
    if not isinstance(replicas, int) or isinstance(replicas, bool):
        raise errors.bad_request(f'Scale in version "v1" cannot be handled: spec.replicas is no int32: {replicas!r}')
    if replicas < 0:
        what = f"Invalid value: {replicas}: must be greater than or equal to 0"
        raise errors.invalid("Scale.autoscaling", old["metadata"]["name"], [("spec.replicas", what)])
    new = copy.deepcopy(old)
    *parents, last = _parts(paths.replicas)
    target = new
    for part in parents:
        target = target.setdefault(part, {})
    target[last] = replicas
    return new


def _kept(resource: Resource, old: Json, new: Json, subresource: str) -> Json:
    """`new` where it may differ from `old`: through /status the status alone, else all but the status."""
    if subresource == "status":
        changed = {key: value for key, value in old.items() if key != "status"}
        changed |= {"status": new["status"]} if "status" in new else {}
        return copy.deepcopy(changed)
    if resource.status:
        new.pop("status", None)
        new |= {"status": copy.deepcopy(old["status"])} if "status" in old else {}
    meta = {key: value for key, value in new["metadata"].items() if key not in KEPT}
    new["metadata"] = meta | {key: old["metadata"][key] for key in KEPT if key in old["metadata"]}
    return new


def _wanted(resource: Resource, item: Json) -> Json:
    """What a generation counts the changes of."""
    if resource.custom:
        return {key: value for key, value in item.items() if key not in ("metadata", "status")}
    wanted: Json = {"spec": item.get("spec")}
    if resource.plural == "deployments":
        wanted["annotations"] = item["metadata"].get("annotations")
    return wanted


def _grace(resource: Resource, item: Json, asked: int | None) -> int:
    """Only a pod that a node has is given time."""
    if resource.plural != "pods" or not item["spec"].get("nodeName"):
        return 0
    if item["status"].get("phase") in ("Failed", "Succeeded"):
        return 0
    return int(item["spec"]["terminationGracePeriodSeconds"] if asked is None else asked)


def _is_over(item: Json) -> bool:
    meta = item["metadata"]
    return "deletionTimestamp" in meta and not meta.get("finalizers") and not meta.get("deletionGracePeriodSeconds")


def _parts(path: str) -> list[str]:
    return path.strip(".").split(".")
