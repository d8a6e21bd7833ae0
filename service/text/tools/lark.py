"""Grammars that leave a model no choice but to call a tool, in llguidance's dialect of Lark.

Arguments follow the tool's JSON schema. White space stands where Python's json.dumps puts it: models were trained on
that, and a grammar that allows any lets a model write blanks for ever.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from service.text.chat import Tool
from service.text.check import parse_json

_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Keywords of a schema that tell themselves, or elsewhere, of other properties.
_OPEN = {"additionalProperties", "unevaluatedProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf"}


class Rules:
    """Collects the rules that expressions refer to."""

    def __init__(self) -> None:
        self._rules: list[str] = []
        self._arguments: dict[str, str] = {}

    def token(self, token_id: int) -> str:
        """A control token goes by its id: llguidance takes `<[TOOL_CALLS]>` for a list of ids."""
        return f"<[{token_id}]>"

    def literal(self, text: str) -> str:
        return json.dumps(text)

    def add(self, name: str, expressions: Iterable[str]) -> str:
        """A rule for any one of the expressions; its name."""
        self._rules.append(f"{name}: " + " | ".join(expressions))
        return name

    def arguments(self, tool: Tool) -> str:
        """Name of the rule for JSON that fits the tool's schema."""
        if tool.name not in self._arguments:
            name = self._arguments[tool.name] = f"arguments_{len(self._arguments)}"
            self._rules.append(f"{name}: %json {json.dumps(_closed(tool) | {'x-guidance': _SPACING})}")
        return self._arguments[tool.name]

    def call_object(self, tool: Tool, key: str) -> str:
        """`{"name": …, key: …}` as `CallObject` reads it."""
        head = f'{{"name": {json.dumps(tool.name)}, "{key}": '
        return f'{self.literal(head)} {self.arguments(tool)} "}}"'

    def text(self, start: str) -> str:
        """The whole grammar."""
        return "\n".join((f"start: {start}", *self._rules))


def _closed(tool: Tool) -> dict[str, Any]:
    """The tool's schema. What does not tell which other arguments there may be allows none: a model that must write
    on would invent them."""
    schema: dict[str, Any] = parse_json(tool.parameters or "{}")
    if _OPEN & schema.keys():
        return {"type": "object"} | schema
    return {"type": "object", "additionalProperties": False} | schema
