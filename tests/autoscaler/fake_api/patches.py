"""The three patches: JSON merge (RFC 7386), JSON patch (RFC 6902), and Kubernetes' strategic merge."""

from __future__ import annotations

import copy
from typing import Any

from tests.autoscaler.fake_api.errors import ApiError, Json, bad_request

MERGE, JSON, STRATEGIC = (f"application/{each}+json" for each in ("merge-patch", "json-patch", "strategic-merge-patch"))
# Lists that a strategic patch merges, and by what: the fields of Kubernetes' own objects that say `patchMergeKey`.
KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "volumeMounts": "mountPath",
    "imagePullSecrets": "name",
    "conditions": "type",
    "ownerReferences": "uid",
}
SETS = ("finalizers",)


def apply(content_type: str, item: Json, patch: Any) -> Json:
    """A patched copy of `item`."""
    if content_type == JSON:
        if not isinstance(patch, list):
            raise bad_request("a JSON patch is a list of operations")
        return _json(copy.deepcopy(item), patch)
    if not isinstance(patch, dict):
        raise bad_request("a merge patch is an object")
    patched: Json = merge(item, patch) if content_type == MERGE else strategic(item, patch)
    return patched


def merge(item: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    merged = dict(item) if isinstance(item, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


def strategic(item: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    if patch.get("$patch") == "replace":
        return {key: value for key, value in patch.items() if key != "$patch"}
    merged = dict(item) if isinstance(item, dict) else {}
    for key, value in patch.items():
        directive, _, field = key.rpartition("/")
        if directive == "$deleteFromPrimitiveList":
            merged[field] = [each for each in merged.get(field, ()) if each not in value]
        elif key.startswith("$"):  # $setElementOrder and $retainKeys say nothing that is looked at here
            continue
        elif value is None:
            merged.pop(key, None)
        elif isinstance(value, list) and key in SETS:
            merged[key] = [*merged.get(key, ()), *(each for each in value if each not in merged.get(key, ()))]
        elif isinstance(value, list) and key in KEYS:
            merged[key] = _merged_list(merged.get(key) or [], value, KEYS[key])
        else:
            merged[key] = strategic(merged.get(key), value)
    return merged


def _merged_list(items: list[Json], patches: list[Json], key: str) -> list[Json]:
    merged = list(items)
    for patch in patches:
        if key not in patch:
            raise bad_request(f"map: {patch} does not contain declared merge key: {key}")
        at = next((n for n, each in enumerate(merged) if each.get(key) == patch[key]), None)
        if patch.get("$patch") == "delete":
            merged = [each for n, each in enumerate(merged) if n != at]
        elif at is None:
            merged.append(strategic({}, patch))
        else:
            merged[at] = strategic(merged[at], patch)
    return merged


def _json(item: Json, operations: list[Json]) -> Json:
    refused = ApiError(422, "Invalid", "the server rejected our request due to an error in our request")
    for each in operations:
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in each["path"].split("/")[1:]]
        try:
            target: Any = item
            for part in parents:
                target = target[int(part) if isinstance(target, list) else part]
            match each["op"], target:
                case "add", list():
                    target.insert(len(target) if last == "-" else int(last), each["value"])
                case "add", dict():
                    target[last] = each["value"]
                case "test", _:
                    if target[int(last) if isinstance(target, list) else last] != each["value"]:
                        raise refused
                case "replace", _:
                    at = int(last) if isinstance(target, list) else last
                    target[at]  # must be there
                    target[at] = each["value"]
                case "remove", _:
                    del target[int(last) if isinstance(target, list) else last]
                case _:
                    raise bad_request(f"JSON patch operation {each['op']!r} is not one that this server knows")
        except (KeyError, IndexError, ValueError, TypeError):
            raise refused from None
    return item
