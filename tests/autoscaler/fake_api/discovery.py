"""What tells clients which kinds there are."""

from __future__ import annotations

from tests.autoscaler.fake_api.errors import Json, no_such_resource
from tests.autoscaler.fake_api.resources import Resource

VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]
VERSION = {"major": "1", "minor": "36", "gitVersion": "v1.36.0-fake", "platform": "linux/amd64"}


def discover(path: str, resources: list[Resource]) -> Json:
    """The answer to GET /version, /api, /apis, /api/v1, /apis/GROUP and /apis/GROUP/VERSION; raises 404 else."""
    parts = path.strip("/").split("/")
    match parts:
        case ["version"]:
            return dict(VERSION)
        case ["healthz" | "livez" | "readyz"]:
            return {"status": "ok"}
        case ["api"]:
            return {"kind": "APIVersions", "versions": ["v1"]}
        case ["apis"]:
            groups = {each.group: each.version for each in resources if each.group}
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(*each) for each in groups.items()]}
        case ["apis", group]:
            for each in resources:
                if each.group == group:
                    return {"kind": "APIGroup", "apiVersion": "v1"} | _group(group, each.version)
        case ["api", version] | ["apis", _, version]:
            group = parts[1] if parts[0] == "apis" else ""
            found = [each for each in resources if (each.group, each.version) == (group, version)]
            if found:
                listed = [entry for each in found for entry in _entries(each)]
                head = {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": found[0].api_version}
                return head | {"resources": listed}
    raise no_such_resource()


def _group(name: str, version: str) -> Json:
    entry = {"groupVersion": f"{name}/{version}", "version": version}
    return {"name": name, "versions": [entry], "preferredVersion": entry}


def _entries(resource: Resource) -> list[Json]:
    common = {"singularName": "", "namespaced": resource.namespaced}
    whole = common | {"name": resource.plural, "kind": resource.kind, "verbs": VERBS}
    whole |= {"singularName": resource.kind.lower(), "shortNames": list(resource.short_names)}
    whole |= {"categories": list(resource.categories)}
    entries = [whole]
    if resource.status:
        entries.append(
            common | {"name": f"{resource.plural}/status", "kind": resource.kind, "verbs": ["get", "patch", "update"]}
        )
    if resource.scale:
        scale = {"name": f"{resource.plural}/scale", "kind": "Scale", "group": "autoscaling", "version": "v1"}
        entries.append(common | scale | {"verbs": ["get", "patch", "update"]})
    return entries
