"""A CustomResourceDefinition as kube-apiserver applies it: pruning, defaults, structural schema, CEL rules.

A keyword of schemas that is not known here makes the registration fail, so that no object is taken for valid because
a rule of it was not looked at.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

from tests.autoscaler.fake_api import errors
from tests.autoscaler.fake_api.cel import Rule, UnsupportedRule
from tests.autoscaler.fake_api.errors import Json
from tests.autoscaler.fake_api.resources import Faults, Resource, ScalePaths

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
}
KNOWN = {
    *("type", "properties", "required", "items", "additionalProperties", "default", "nullable", "description", "title"),
    *(
        "enum",
        "pattern",
        "format",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "minLength",
        "maxLength",
    ),
    *("minItems", "maxItems", "minProperties", "maxProperties", "example"),
    *("x-kubernetes-validations", "x-kubernetes-preserve-unknown-fields", "x-kubernetes-list-type"),
    *("x-kubernetes-list-map-keys", "x-kubernetes-map-type"),
}
SIZES = {  # the sign is that of length - limit where it is wrong
    "minLength": (-1, "should be at least {} chars long"),
    "maxLength": (1, "should be at most {} chars long"),
    "minItems": (-1, "should have at least {} items"),
    "maxItems": (1, "must have at most {} items"),
    "minProperties": (-1, "should have at least {} properties"),
    "maxProperties": (1, "must have at most {} properties"),
}


class Definition:
    """Of one kind. Raises ApiError 422 for a CRD that the fake cannot keep to the letter."""

    def __init__(self, crd: Json) -> None:
        spec, names = crd["spec"], crd["spec"]["names"]
        served = [each for each in spec["versions"] if each["served"]]
        if len(served) != 1:
            raise self._refused(crd, "spec.versions", "one served version is known here")
        [version] = served
        self._schema = version["schema"]["openAPIV3Schema"]
        self._rules: dict[str, Rule] = {}
        try:
            self._register(self._schema, "")
        except UnsupportedRule as error:
            raise self._refused(crd, "spec.versions[0].schema", str(error)) from None
        subresources = version.get("subresources", {})
        scale = subresources.get("scale")
        self.resource = Resource(
            group=spec["group"],
            version=version["name"],
            plural=names["plural"],
            kind=names["kind"],
            short_names=tuple(names.get("shortNames", ())),
            categories=tuple(names.get("categories", ())),
            namespaced=spec["scope"] == "Namespaced",
            status="status" in subresources,
            scale=None if scale is None else _scale_paths(scale),
            generation=True,
            unconditional=False,
            custom=True,
            columns=tuple(version.get("additionalPrinterColumns", ())),
        )

    def admit(self, item: Json, old: Json | None, *, strict: bool) -> Json:
        """Pruned and with defaults. Raises 400 for unknown fields where `strict`, 422 for what the schema forbids."""
        head: Json = {key: item[key] for key in ("apiVersion", "kind", "metadata")}
        body, unknown = self._pruned(self._schema, {key: value for key, value in item.items() if key not in head}, "")
        if strict and unknown:
            words = ", ".join(f'unknown field "{field}"' for field in unknown)
            raise errors.bad_request(f"strict decoding error: {words}")
        whole: Json = head | body
        if faults := list(self._faults(self._schema, whole, old, "")):
            raise errors.invalid(self.resource.qualified_kind, item["metadata"].get("name", ""), faults)
        return whole

    def _register(self, schema: Json, path: str) -> None:
        if strange := set(schema) - KNOWN:
            raise UnsupportedRule(f"{path or '.'}: schema keywords {sorted(strange)} are not known here")
        for rule in schema.get("x-kubernetes-validations", ()):
            self._rules[rule["rule"]] = Rule(rule["rule"])
        for name, inner in schema.get("properties", {}).items():
            if (path, name) != ("", "metadata"):
                self._register(inner, f"{path}.{name}")
        for key in ("items", "additionalProperties"):
            if isinstance(schema.get(key), dict):
                self._register(schema[key], f"{path}[]")

    def _refused(self, crd: Json, field: str, what: str) -> errors.ApiError:
        kind = "CustomResourceDefinition.apiextensions.k8s.io"
        return errors.invalid(kind, crd["metadata"]["name"], [(field, what)])

    def _pruned(self, schema: Json, value: Any, path: str) -> tuple[Any, list[str]]:
        """With defaults, and without fields that the schema does not name; those are told."""
        unknown: list[str] = []
        if isinstance(value, list) and "items" in schema:
            items = [self._pruned(schema["items"], each, f"{path}[{n}]") for n, each in enumerate(value)]
            return [item for item, _ in items], [field for _, fields in items for field in fields]
        if not isinstance(value, dict):
            return value, []
        properties, rest = schema.get("properties", {}), schema.get("additionalProperties")
        kept: Json = {}
        for key, inner in value.items():
            within = f"{path}.{key}".removeprefix(".")
            if key in properties or isinstance(rest, dict):
                if inner is None and "default" in properties.get(key, {}) and not properties[key].get("nullable"):
                    continue  # null stands for the default
                kept[key], strange = self._pruned(properties.get(key, rest), inner, within)
                unknown += strange
            elif schema.get("x-kubernetes-preserve-unknown-fields") or rest is True:
                kept[key] = inner
            else:
                unknown.append(within)
        for key, inner in properties.items():
            if key not in kept and "default" in inner:
                kept[key], _ = self._pruned(inner, copy.deepcopy(inner["default"]), f"{path}.{key}")
        return kept, unknown

    def _faults(self, schema: Json, value: Any, old: Any, path: str) -> Iterator[tuple[str, str]]:
        if value is None and schema.get("nullable"):
            return
        field = path or "<nil>"
        if not _is(value, schema.get("type")):
            kind = _type(value)
            yield field, f'Invalid value: "{kind}": {path} in body must be of type {schema["type"]}: "{kind}"'
            return
        inner = [*self._inner(schema, value, old, path)]
        yield from _limits(schema, value, path)
        yield from inner
        if not inner:  # rules see only what is of the right type
            yield from self._broken_rules(schema, value, old, field)

    def _inner(self, schema: Json, value: Any, old: Any, path: str) -> Faults:
        faults: Faults = []
        if isinstance(value, dict):
            for name in schema.get("required", ()):
                if name not in value:
                    faults.append((f"{path}.{name}".removeprefix("."), "Required value"))
            for name, each in value.items():
                within = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
                before = old.get(name) if isinstance(old, dict) else None
                if isinstance(within, dict) and (path, name) != ("", "metadata"):
                    faults += self._faults(within, each, before, f"{path}.{name}".removeprefix("."))
        elif isinstance(value, list) and "items" in schema:
            for n, each in enumerate(value):  # lists are not correlated with their old state
                faults += self._faults(schema["items"], each, None, f"{path}[{n}]")
        return faults

    def _broken_rules(self, schema: Json, value: Any, old: Any, field: str) -> Iterator[tuple[str, str]]:
        for each in schema.get("x-kubernetes-validations", ()):
            rule = self._rules[each["rule"]]
            if rule.is_transition and old is None:
                continue
            try:
                holds = rule.holds(value, old)
            except (KeyError, TypeError) as error:
                yield field, f'Invalid value: "{_type(value)}": rule {rule.text}: no such key or overload: {error}'
                continue
            if not holds:
                where = field if "fieldPath" not in each else f"{field}{each['fieldPath']}"
                yield where, f'Invalid value: "{_type(value)}": {each.get("message") or f"failed rule: {rule.text}"}'


def _limits(schema: Json, value: Any, path: str) -> Iterator[tuple[str, str]]:
    def fault(what: str) -> tuple[str, str]:
        return path, f"Invalid value: {value!r}: {path} in body {what}"

    if "enum" in schema and value not in schema["enum"]:
        allowed = ", ".join(f'"{each}"' for each in schema["enum"])
        yield path, f'Unsupported value: "{value}": supported values: {allowed}'
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = schema.get("minimum"), schema.get("maximum")
        above, below = schema.get("exclusiveMinimum", False), schema.get("exclusiveMaximum", False)
        if low is not None and (value < low or (above and value == low)):
            yield fault(f"should be greater than {'' if above else 'or equal to '}{low}")
        if high is not None and (value > high or (below and value == high)):
            yield fault(f"should be less than {'' if below else 'or equal to '}{high}")
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        yield fault(f"should match '{schema['pattern']}'")
    if isinstance(value, (str, list, dict)):
        for keyword, (sign, words) in SIZES.items():
            if keyword in schema and (len(value) - schema[keyword]) * sign > 0:
                yield fault(words.format(schema[keyword]))


def _is(value: Any, wanted: str | None) -> bool:
    if wanted is None:
        return True
    if isinstance(value, bool) or wanted == "boolean":
        return isinstance(value, bool) and wanted == "boolean"
    if wanted == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, TYPES[wanted])


def _type(value: Any) -> str:
    if value is None:
        return "null"
    kinds = (("boolean", bool), ("integer", int), ("number", float), ("string", str), ("array", list))
    return next((name for name, kind in kinds if isinstance(value, kind)), "object")


def _scale_paths(scale: Json) -> ScalePaths:
    # A path that nothing is found at: a custom resource has no selector unless its CRD says where
    selector = scale.get("labelSelectorPath", ".status.-")
    return ScalePaths(scale["specReplicasPath"], scale["statusReplicasPath"], selector)
