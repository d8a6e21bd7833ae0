"""Writes the table of values into the chart's README.md, from the comments of values.yaml: `make chart-readme`.

What is one value and what is a group of them is as values.schema.json says: an object with named properties is a group.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from helm.chart import CHART, SCHEMA, VALUES

PAGE = CHART / "README.md"
BEGIN, END = "<!-- values -->\n", "<!-- end -->"
ONE_OF = "bearerSecret", "tokenSecret", "apiKeysSecret", "apiKeySecret", "tlsSecret"  # said in one line, read as one


@dataclass(frozen=True, slots=True)
class Value:
    """`path` as `--set` takes it, `default` as JSON."""

    path: str
    default: str
    comment: str


def values() -> list[Value]:
    """Every value of the chart, in the order of values.yaml."""
    text = VALUES.read_text()
    schema = json.loads(SCHEMA.read_text())
    return list(_values(yaml.compose(text, yaml.SafeLoader), schema, text.splitlines(), ()))


def _values(node: Any, schema: dict[str, Any], lines: list[str], path: tuple[str, ...]) -> Iterator[Value]:
    for key, value in node.value:
        here = (*path, key.value)
        below = schema["properties"][key.value]
        if "properties" in below and not (key.value in ONE_OF or value.flow_style):
            yield from _values(value, below, lines, here)
        else:
            default = yaml.SafeLoader("").construct_document(value)
            yield Value(".".join(here), json.dumps(default), _comment(lines, key.start_mark.line))


def _comment(lines: list[str], line: int) -> str:
    """The comment lines right above."""
    said: list[str] = []
    while line > 0 and (above := lines[line - 1].strip()).startswith("#"):
        said.insert(0, above.removeprefix("#").strip())
        line -= 1
    return " ".join(said)


def table() -> list[str]:
    rows = [f"| `{each.path}` | `{each.default}` | {each.comment} |".replace("|`", "| `") for each in values()]
    return ["| value | default | |", "|---|---|---|", *rows]


def current() -> str:
    """The page with its table made anew."""
    head, _, rest = PAGE.read_text().partition(BEGIN)
    return head + BEGIN + "\n".join(table()) + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(current())
