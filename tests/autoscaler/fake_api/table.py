"""`Table`: what `kubectl get` asks for, so that the columns of a CRD are the server's to fill in."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

from tests.autoscaler.fake_api.errors import Json
from tests.autoscaler.fake_api.resources import Resource

STEP = re.compile(r"""\.([\w-]+)|\[(\d+)\]|\[\?\(@\.([\w.]+)\s*==\s*["']([^"']*)["']\)\]|\["([^"]+)"\]|\['([^']+)'\]""")
AGE = {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}
UNITS = (
    ("d", 86400, 2),
    ("h", 3600, 3),
    ("m", 60, 2),
    ("s", 1, 120),
)  # unit, seconds, from how many of them it is used


def table(resource: Resource, items: list[Json], version: str, now: float) -> Json:
    """Columns of built-in kinds are name and age alone; kubectl shows more of a real server's."""
    columns = resource.columns or (AGE,)
    name = {"name": "Name", "type": "string", "format": "name", "description": "", "priority": 0}
    definitions = [
        {
            "name": each["name"],
            "type": each["type"],
            "format": "",
            "description": "",
            "priority": each.get("priority", 0),
        }
        for each in columns
    ]
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": {"resourceVersion": version},
        "columnDefinitions": [name, *definitions],
        "rows": [_row(item, columns, now) for item in items],
    }


def _row(item: Json, columns: tuple[Json, ...], now: float) -> Json:
    cells = [_cell(each, find(item, each["jsonPath"]), now) for each in columns]
    partial = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": item["metadata"]}
    return {"cells": [item["metadata"]["name"], *cells], "object": partial}


def _cell(column: Json, value: Any, now: float) -> Any:
    if value is None:
        return None
    if column["type"] == "date":
        return age(now - datetime.fromisoformat(value).timestamp())
    return value if column["type"] in ("integer", "number", "boolean") else str(value)


def find(item: Any, path: str) -> Any:
    """The JSONPath of printer columns: fields, indices, and filters by equality."""
    at = 0
    while at < len(path):
        step = STEP.match(path, at)
        if step is None:
            raise ValueError(f"JSONPath {path!r} is beyond what is known here, from {path[at:]!r}")
        at = step.end()
        field, index, key, value, quoted, single = step.groups()
        if index is not None or key is not None:
            found = item if isinstance(item, list) else []
            if index is not None:
                item = found[int(index)] if int(index) < len(found) else None
            else:
                item = next((each for each in found if each.get(key) == value), None)
        else:
            item = item.get(field or quoted or single) if isinstance(item, dict) else None
    return item


def age(seconds: float) -> str:
    """As kubectl says it, without the second unit that it adds for a while."""
    whole = max(0, int(seconds))
    for unit, size, least in UNITS:
        if whole // size >= least or (unit == "s"):
            return f"{whole // size}{unit}"
    raise AssertionError("unreachable")
