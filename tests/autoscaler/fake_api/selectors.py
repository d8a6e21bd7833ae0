"""Label and field selectors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from tests.autoscaler.fake_api.errors import Json, bad_request

Match = Callable[[Json], bool]

SET = re.compile(r"^(?P<key>\S+)\s+(?P<operator>in|notin)\s*\((?P<values>[^)]*)\)$")
EQUAL = re.compile(r"^(?P<key>[^!=\s]+)\s*(?P<operator>==|!=|=)\s*(?P<value>\S*)$")
EXISTS = re.compile(r"^(?P<absent>!?)\s*(?P<key>[\w./-]+)$")
FIELDS = ("metadata.name", "metadata.namespace")
OPERATORS = {
    "In": "{key} in ({values})",
    "NotIn": "{key} notin ({values})",
    "Exists": "{key}",
    "DoesNotExist": "!{key}",
}


def text_of(selector: Mapping[str, Any]) -> str:
    """A workload's `spec.selector` as the text that lists are asked with."""
    words = [f"{key}={value}" for key, value in sorted((selector.get("matchLabels") or {}).items())]
    for each in selector.get("matchExpressions") or ():
        values = ",".join(sorted(each.get("values") or ()))
        words.append(OPERATORS[each["operator"]].format(key=each["key"], values=values))
    return ",".join(words)


def labels(text: str) -> Match:
    tests = [_requirement(part.strip()) for part in re.split(r",(?![^(]*\))", text) if part.strip()]

    def match(item: Json) -> bool:
        found = item["metadata"].get("labels") or {}
        return all(test(found) for test in tests)

    return match


def _requirement(text: str) -> Callable[[dict[str, str]], bool]:
    if found := SET.match(text):
        key, values = found["key"], {value.strip() for value in found["values"].split(",")}
        if found["operator"] == "in":
            return lambda labels: labels.get(key) in values
        return lambda labels: labels.get(key) not in values  # also where there is no such label
    if found := EQUAL.match(text):
        key, value = found["key"], found["value"]
        if found["operator"] == "!=":
            return lambda labels: labels.get(key) != value
        return lambda labels: labels.get(key) == value
    if found := EXISTS.match(text):
        key, wanted = found["key"], not found["absent"]
        return lambda labels: (key in labels) is wanted
    raise bad_request(f'unable to parse requirement: found "{text}"')


def fields(text: str, known: tuple[str, ...] = ()) -> Match:
    """`known`: what objects of this kind can be selected by, besides name and namespace."""
    tests: list[tuple[list[str], str, bool]] = []
    for part in filter(None, text.split(",")):
        found = EQUAL.match(part)
        if not found:
            raise bad_request(f'invalid field selector: "{part}"')
        if found["key"] not in (*FIELDS, *known):
            raise bad_request(f"field label not supported: {found['key']}")
        tests.append((found["key"].split("."), found["value"], found["operator"] != "!="))

    def match(item: Json) -> bool:
        return all((str(value_at(item, path) or "") == value) is wanted for path, value, wanted in tests)

    return match


def by(label_selector: str, field_selector: str, known: tuple[str, ...] = ()) -> Match:
    of_labels, of_fields = labels(label_selector), fields(field_selector, known)
    return lambda item: of_labels(item) and of_fields(item)


def value_at(item: Json, path: list[str]) -> object:
    found: object = item
    for part in path:
        found = found.get(part) if isinstance(found, dict) else None
    return found
