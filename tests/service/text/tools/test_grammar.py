"""Grammars that leave nothing but calls: what llguidance lets through is what the parser of the format reads as calls
of the offered tools, with arguments that fit."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from service.text.chat import Tool
from service.text.tools.format import ToolFormat
from tests.service.text.tools.reading import FORMATS, KNOWN, OFFERED, TOKENS

EOS = 256
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", 'Pa"r]}is']}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city"],
}
TOOLS = (Tool(name="weather", parameters=json.dumps(WEATHER)), Tool(name="get_time"))


class _Vocabulary:
    """A token for each byte, and control tokens after them."""

    is_tokenizer_wrapper = True
    eos_token_id, bos_token_id = EOS, None
    tokens = [bytes([value]) for value in range(256)] + [b"</s>"] + [name.encode() for name in TOKENS]
    special_token_ids = list(range(256, 257 + len(TOKENS)))  # noqa: RUF012

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


IDS = {name: 257 + number for number, name in enumerate(TOKENS)}
NAMES = {token_id: name for name, token_id in IDS.items()}


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return LLTokenizer(_Vocabulary())


def grammar(name: str, *, only_one: bool, tools: tuple[Tool, ...] = TOOLS) -> tuple[str, ToolFormat]:
    """The format of that name for the vocabulary here, and its grammar."""
    controls = {token: IDS[token] for token in KNOWN[name]}
    known = FORMATS[name]
    format: ToolFormat
    if name.startswith("mistral"):
        format = type(known)(controls, listed=name == "mistral v3", with_ids=name == "mistral v11")  # type: ignore[call-arg]
    else:
        format = type(known)(controls)  # type: ignore[call-arg]
    return format.grammar(tools, only_one=only_one), format


def walk(text: str, tokenizer: LLTokenizer, rng: random.Random, most: int = 3000) -> list[int]:
    """Tokens of a model that chooses at random among those that the grammar allows, and ends as soon as it may."""
    matcher = LLMatcher(tokenizer, text, log_level=0)
    ids: list[int] = []
    while not matcher.is_stopped() and len(ids) < most:
        mask = matcher.compute_bitmask()
        assert not matcher.is_error(), matcher.get_error()
        allowed = [token for token in range(257 + len(TOKENS)) if mask[token >> 3] >> (token & 7) & 1]
        token = EOS if EOS in allowed and rng.random() < 0.7 else rng.choice(allowed)
        assert matcher.consume_token(token)
        ids.append(token)
    assert not matcher.is_error(), matcher.get_error()
    return [token for token in ids if token != EOS]


def calls(format: ToolFormat, ids: list[int], *, only_one: bool = False) -> tuple[str, list[tuple[str, str]]]:
    parser = format.parser(OFFERED, only_one=only_one)
    text, made = "", []
    for said, deltas in [*(parser.push(i, chr(i) if i < 256 else "") for i in ids), parser.finish()]:
        text += said
        for delta in deltas:
            if delta.name:
                made.append((delta.name, ""))
            made[-1] = (made[-1][0], made[-1][1] + delta.arguments)
    return text, made


def fits(name: str, arguments: dict[str, Any]) -> bool:
    if name == "get_time":
        return not arguments
    days = arguments.get("days", 1)
    return arguments["city"] in WEATHER["properties"]["city"]["enum"] and 1 <= days <= 9  # type: ignore[index]


@pytest.mark.parametrize("only_one", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_whatever_the_grammar_lets_through_is_calls_that_fit(name: str, only_one: bool, tokenizer: LLTokenizer) -> None:
    text, format = grammar(name, only_one=only_one)
    rng = random.Random(1)
    names: set[str] = set()
    most = 0
    for _ in range(15):
        ids = walk(text, tokenizer, rng)
        said, made = calls(format, ids)
        assert said == "", "".join(NAMES.get(i, chr(i)) for i in ids)
        assert made
        assert all(fits(called, json.loads(arguments)) for called, arguments in made)
        names |= {called for called, _ in made}
        most = max(most, len(made))
    assert names == {"weather", "get_time"}
    assert most == 1 if only_one or name == "llama" else most > 1


@pytest.mark.parametrize("name", FORMATS)
def test_a_named_tool_is_the_only_one_that_can_be_called(name: str, tokenizer: LLTokenizer) -> None:
    text, format = grammar(name, only_one=True, tools=TOOLS[1:])
    rng = random.Random(2)
    assert [calls(format, walk(text, tokenizer, rng)) for _ in range(3)] == [("", [("get_time", "{}")])] * 3


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "null"}}},
        {"anyOf": [{"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}]},
        {"type": "object", "additionalProperties": {"type": "null"}},
        {"properties": {'"\\\n%json {': {"const": "</tool_call>[ARGS]"}}, "required": ['"\\\n%json {']},
        {"x-guidance": {"whitespace_flexible": True}, "$schema": "http://json-schema.org/draft-07/schema#"},
    ],
)
@pytest.mark.parametrize("name", FORMATS)
def test_schemas_of_many_forms_make_grammars(name: str, parameters: dict[str, Any], tokenizer: LLTokenizer) -> None:
    text, format = grammar(name, only_one=True, tools=(Tool(name="f-1", parameters=json.dumps(parameters)),))
    said, made = calls(format, walk(text, tokenizer, random.Random(3)))
    assert (said, [called for called, _ in made]) == ("", ["f-1"])
    assert isinstance(json.loads(made[0][1]), dict)
