"""The custom resource: what it takes only ever grows, and its rules refuse what they name.

`python -m tests.helm.test_resource` writes the baseline anew, when a version of the chart is published.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from helm.chart import DEFINITION
from tests.helm.test_rendering import KUBERNETES

BASELINE = Path(__file__).parent / "baseline" / "queueautoscaler.yaml"
Schema = dict[str, Any]

# of a schema: what may only fall, only rise, and not change where it was there before
FLOORS, CEILINGS = ("minimum", "minLength", "minItems"), ("maximum", "maxLength", "maxItems")
KEPT = ("type", "format", "default", "x-kubernetes-list-type", "x-kubernetes-list-map-keys")
OPEN = ("pattern", "exclusiveMinimum", "exclusiveMaximum")  # may go, and not come or change


def load(path: Path) -> Schema:
    found: Schema = yaml.safe_load(path.read_text())
    return found


def narrowed(old: Schema, new: Schema, path: str = "") -> Iterator[str]:
    """What a schema took and another does not take, or takes for something else."""
    for key in KEPT:
        if key in old and old[key] != new.get(key):
            yield f"{path}: {key} was {old[key]}"
    for key in (*FLOORS, *CEILINGS):
        sign = 1 if key in CEILINGS else -1
        if key in new and (key not in old or sign * new[key] < sign * old[key]):
            yield f"{path}: {key} was {old.get(key)}"
    for key in OPEN:
        if key in new and new[key] != old.get(key):
            yield f"{path}: {key} was {old.get(key)}"
    if "enum" in new and not set(new["enum"]) >= set(old.get("enum", [None])):
        yield f"{path}: enum was {old.get('enum')}"
    if more := set(new.get("required", [])) - set(old.get("required", [])):
        yield f"{path}: {sorted(more)} was not required"
    before = [rule["rule"] for rule in old.get("x-kubernetes-validations", [])]
    for rule in new.get("x-kubernetes-validations", []):
        if rule["rule"] not in before:
            yield f"{path}: was not ruled by {rule['rule']}"
    for name, below in old.get("properties", {}).items():
        if name not in new.get("properties", {}):
            yield f"{path}.{name}: is gone"
        else:
            yield from narrowed(below, new["properties"][name], f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if key in old:
            yield from narrowed(old[key], new.get(key, {}), f"{path}[]")


def broken(old: Schema, new: Schema) -> Iterator[str]:
    """Of whole definitions: also names, versions and subresources, which clients and stored objects depend on."""
    for key in ("group", "scope", "names"):
        if old["spec"][key] != new["spec"][key]:
            yield f"{key} was {old['spec'][key]}"
    versions = {each["name"]: each for each in new["spec"]["versions"]}
    for version in old["spec"]["versions"]:
        later = versions.get(version["name"], {"schema": {"openAPIV3Schema": {}}})
        if not later.get("served") or later.get("subresources") != version["subresources"]:
            yield f"{version['name']}: is not served as it was"
        yield from narrowed(*(each["schema"]["openAPIV3Schema"] for each in (version, later)), version["name"])


def test_it_takes_all_that_it_took() -> None:
    assert list(broken(load(BASELINE), load(DEFINITION))) == []


def spec_of(definition: Schema) -> Schema:
    [version] = definition["spec"]["versions"]
    found: Schema = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return found


def test_what_would_break_is_found() -> None:
    worse = load(DEFINITION)
    spec = spec_of(worse)
    del spec["properties"]["dryRun"]
    spec["required"].append("target")
    spec["properties"]["minReplicas"]["minimum"] = 1
    spec["properties"]["schedules"]["maxItems"] = 1
    spec["properties"]["scaleTargetRef"]["properties"]["kind"]["enum"] = ["Deployment"]
    spec["properties"]["replicas"]["pattern"] = "x"
    spec["properties"]["grpcPort"]["default"] = 1
    spec["x-kubernetes-validations"].append({"rule": "false"})
    worse["spec"]["names"]["plural"] = "others"
    assert len(list(broken(load(DEFINITION), worse))) == 9


@pytest.mark.parametrize("version", KUBERNETES)
def test_it_is_a_definition(version: str) -> None:
    kubernetes_validate.validate(load(DEFINITION), version, strict=True)


def schemas(schema: Schema) -> Iterator[Schema]:
    yield schema
    for below in (*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")):
        if below:
            yield from schemas(below)


def test_every_field_has_a_type_and_every_default_is_valid() -> None:
    for schema in schemas(load(DEFINITION)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]):
        kinds = {"integer": int, "number": (int, float), "string": str, "boolean": bool, "object": dict, "array": list}
        assert schema["type"] in kinds
        if "default" in schema:
            assert isinstance(schema["default"], kinds[schema["type"]])
        # a rule that looks at each of many needs a bound of their number
        assert schema["type"] != "array" or schema.get("x-kubernetes-list-type")


def defaulted(schema: Schema, value: Any) -> Any:
    """As the API server fills it in."""
    if isinstance(value, dict):
        for name, below in schema.get("properties", {}).items():
            if name not in value and "default" in below:
                value[name] = copy.deepcopy(below["default"])
            if name in value:
                value[name] = defaulted(below, value[name])
    if isinstance(value, list):
        return [defaulted(schema["items"], each) for each in value]
    return value


class Fields(dict[str, Any]):
    """What a rule calls self: fields are attributes."""

    def __getattr__(self, name: str) -> Any:
        value = self[name]
        if isinstance(value, list):
            return [Fields(each) for each in value]
        return Fields(value) if isinstance(value, dict) else value


def holds(rule: str, value: Schema) -> bool:
    """As much of CEL as the rules are written in."""
    python = re.sub(r"has\(self\.(\w+)\)", r"('\1' in self)", rule)
    python = re.sub(r"(self\.\w+)\.all\((\w+), (.*)\)$", r"all(\3 for \2 in \1)", python)
    python = re.sub(r"!(?=[('])", " not ", python).replace("&&", " and ").replace("||", " or ")
    return bool(eval(python.strip(), {"self": Fields(value)}))


def refusals(schema: Schema, value: Any) -> list[str]:
    found = [rule["message"] for rule in schema.get("x-kubernetes-validations", []) if not holds(rule["rule"], value)]
    for name, below in schema.get("properties", {}).items():
        if isinstance(value, dict) and name in value:
            found += refusals(below, value[name])
    return found


def refused(**spec: Any) -> list[str]:
    schema = spec_of(load(DEFINITION))
    return refusals(schema, defaulted(schema, {"scaleTargetRef": {"kind": "Deployment", "name": "nemo"}, **spec}))


def schedule(least: int) -> Schema:
    return {"cron": "0 8 * * 1-5", "durationSeconds": 3600, "minReplicas": least}


@pytest.mark.parametrize(
    "spec",
    [
        {"maxReplicas": 1},
        {"maxReplicas": 4, "minReplicas": 0, "scaleToZero": {"enabled": True}},
        {"maxReplicas": 4, "replicas": 4},
        {"maxReplicas": 4, "replicas": 0},
        {"maxReplicas": 4, "target": {"queuedTokensPerReplica": 8192}},
        {"maxReplicas": 4, "target": {"queueWaitSeconds": 1}},
        {"maxReplicas": 4, "schedules": [schedule(4), schedule(1)]},
    ],
)
def test_what_makes_sense_is_taken(spec: Schema) -> None:
    assert refused(**spec) == []


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ({"maxReplicas": 2, "minReplicas": 3}, "minReplicas must be at most maxReplicas"),
        ({"maxReplicas": 2, "minReplicas": 0}, "minReplicas is 0 only where scaleToZero.enabled"),
        ({"maxReplicas": 2, "replicas": 3}, "replicas must be at most maxReplicas"),
        ({"maxReplicas": 2, "schedules": [schedule(1), schedule(3)]}, "of every schedule must be at most maxReplicas"),
        ({"maxReplicas": 2, "metricsPort": 8001}, "two ports"),
        (
            {"maxReplicas": 2, "target": {"queueWaitSeconds": 1, "queuedTokensPerReplica": 1}},
            "either queueWaitSeconds or queuedTokensPerReplica",
        ),
        ({"maxReplicas": 2, "target": {"queueWaitSeconds": 3}}, "queueWaitSeconds must be at most ttftSeconds"),
    ],
)
def test_a_contradiction_is_refused_by_name(spec: Schema, named: str) -> None:
    [message] = refused(**spec)
    assert named in message


if __name__ == "__main__":
    BASELINE.write_text(DEFINITION.read_text())
