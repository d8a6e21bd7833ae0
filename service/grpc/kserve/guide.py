"""What clients of Triton's LLM backends call guided decoding or structured outputs, as a grammar.

    vLLM           guided_decoding or structured_outputs = {"json": …} {"regex": …} {"choice": […]} {"grammar": …}
                   {"json_object": true}; or guided_json, guided_regex, guided_choice, guided_grammar
    TensorRT-LLM   guided_decoding_guide_type = json | json_schema | regex | lark, guided_decoding_guide = the text

Schemas may be JSON or its text. Grammars are Lark, in llguidance's dialect.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import service.grpc.kserve.values as values
from engine import Grammar
from service.errors import invalid
from service.grpc.kserve.values import shown
from service.text.grammar import choice

GUIDE_TYPES = ("json", "json_schema", "regex", "lark")  # of TensorRT-LLM, and ours for grammars


def json_schema(field: str, value: object) -> Grammar:
    try:
        text = value if isinstance(value, str) else json.dumps(value)
    except RecursionError:
        raise invalid(field, "is nested too deeply") from None
    return Grammar(kind="json_schema", text=text)


def regex(field: str, value: object) -> Grammar:
    return Grammar(kind="regex", text=values.text(field, value))


def lark(field: str, value: object) -> Grammar:
    return Grammar(kind="lark", text=values.text(field, value))


def one_of(field: str, value: object) -> Grammar:
    texts = values.strings(field, value)
    if not texts or not all(texts):
        raise invalid(field, f"{shown(value)} must be a list of texts that are not empty")
    return choice(texts)


def json_object(field: str, value: object) -> Grammar | None:
    return Grammar(kind="json_object") if values.boolean(field, value) else None


WAYS: Mapping[str, Callable[[str, object], Grammar | None]] = {
    "json": json_schema,
    "regex": regex,
    "choice": one_of,
    "grammar": lark,
    "json_object": json_object,
}


def guide(field: str, value: object) -> Grammar | None:
    """vLLM's GuidedDecodingParams or StructuredOutputsParams, or their JSON text; None if they ask for nothing.

    Raises:
        ServiceError: INVALID_ARGUMENT for an option that is not served, or several at once.
    """
    options: Any = values.json_value(field, value) if isinstance(value, str) else value
    if not isinstance(options, dict):
        raise invalid(field, f"{shown(options)} must be an object with one of {', '.join(WAYS)}")
    given = {name: option for name, option in options.items() if option not in (None, False)}
    if unknown := sorted(given.keys() - WAYS.keys()):
        raise invalid(f"{field}.{unknown[0]}", f"is not served; there are {', '.join(WAYS)}")
    return only(field, [WAYS[name](f"{field}.{name}", option) for name, option in given.items()])


def only(field: str, found: list[Grammar | None]) -> Grammar | None:
    """The one grammar that is asked for, if one is."""
    grammars = [grammar for grammar in found if grammar is not None]
    if len(grammars) > 1:
        raise invalid(field, f"{len(grammars)} grammars are given; a completion can follow one")
    return grammars[0] if grammars else None


def typed_guide(kind: str, text: str) -> Grammar | None:
    """TensorRT-LLM's two tensors; both are empty where nothing is asked for."""
    if not kind and not text:
        return None
    if kind == "json":
        return Grammar(kind="json_object")
    if kind == "json_schema":
        return Grammar(kind="json_schema", text=text)
    if kind == "regex":
        return Grammar(kind="regex", text=text)
    if kind == "lark":
        return Grammar(kind="lark", text=text)
    raise invalid("guided_decoding_guide_type", f"{shown(kind)} is not served; there are {', '.join(GUIDE_TYPES)}")
