"""A vocabulary for tiny models, and grammars over it: what texts they allow is known without them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from engine.core import EngineCore
from engine.errors import InvalidRequestError
from engine.grammar.compiler import Grammars
from engine.grammar.matcher import Matcher
from engine.grammar.trial import Verdict
from engine.request import FinishReason, Grammar, Request, SamplingParams, TokenEvent, Vocabulary
from engine.step import Masks

SIZE = 160  # of the vocabulary of `tests.tiny_models`
EOS, CALL = 2, 150
_MORE = ['{"', '":', '": ', '", "', '"}', "true", "false", "null", "12", "2026", "abc", "aba", "ab", " a", "  ", "[]"]


def tiny_vocabulary() -> Vocabulary:
    """Printable ASCII one by one, some longer tokens, parts of characters, special ones, and ids that no text has."""
    tokens = [b"<unk>", b"<s>", b"</s>", *(bytes([value]) for value in range(32, 127)), b"\n", b"\t"]
    tokens += [text.encode() for text in _MORE] + [b"\xc3", b"\xa9", "é".encode(), "😀".encode()[:2], b"\x98\x80"]
    tokens += [b""] * (CALL - len(tokens)) + [b"[CALL]"]
    return Vocabulary(tokens=tokens, special=[0, 1, EOS, CALL])


VOCABULARY = tiny_vocabulary()


class Passed:
    """See `engine.grammar.trial.Trial`: without a process, for grammars that harm nobody."""

    def __init__(self, setting: object) -> None:
        pass

    def judge(self, grammar: Grammar) -> Verdict:
        return Verdict()

    def close(self) -> None:
        pass


def text_of(tokens: list[int]) -> str:
    """Special tokens by their names."""
    return b"".join(VOCABULARY.tokens[token] for token in tokens).decode(errors="replace")


def compiled(grammars: Grammars, grammar: Grammar, *stops: int, min_tokens: int = 0) -> Matcher:
    """A completion at its beginning. Raises InvalidRequestError."""
    params = SamplingParams(grammar=grammar, stop_token_ids=stops, min_tokens=min_tokens, ignore_eos=True)
    grammars.compile("one", params)
    while not (taken := grammars.take()):
        time.sleep(0.001)
    matcher = taken["one"]
    if isinstance(matcher, InvalidRequestError):
        raise matcher
    return matcher


def bits(mask: bytes, size: int = SIZE) -> set[int]:
    return {token for token in range(size) if mask[token // 8] >> (token % 8) & 1}


def all_of(masks: Masks) -> dict[int, set[int]]:
    return {row: bits(mask) for row, mask in masks().items()}


def run_to_end(core: EngineCore) -> list[TokenEvent]:
    """Step while there is anything to do, grammars included."""
    events: list[TokenEvent] = []
    while core.has_work or core.is_compiling:
        events += core.admit_compiled()
        if core.has_work:
            events += core.step()
        else:
            time.sleep(0.001)
    return events


@dataclass(frozen=True)
class Wanted:
    """A grammar, and whether a whole text is what it asks for."""

    grammar: Grammar
    holds: Callable[[str], bool]


def is_json(check: Callable[[object], bool]) -> Callable[[str], bool]:
    def holds(text: str) -> bool:
        try:
            return check(json.loads(text))
        except ValueError:
            return False

    return holds


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "ab", "abc"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def is_person(value: object) -> bool:
    if not isinstance(value, dict) or set(value) != {"name", "age", "tags"}:
        return False
    name, age, tags = value["name"], value["age"], value["tags"]
    fits = isinstance(name, str) and len(name) <= 6 and type(age) is int and 0 <= age <= 150
    return fits and isinstance(tags, list) and len(tags) <= 3 and all(tag in ("a", "ab", "abc") for tag in tags)


def matches(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None


WANTED = {
    "a person": Wanted(Grammar(kind="json_schema", text=json.dumps(PERSON)), is_json(is_person)),
    "any object": Wanted(Grammar(kind="json_object"), is_json(lambda value: isinstance(value, dict))),
    "a date": Wanted(Grammar(kind="regex", text=r"\d{4}-[01]\d-[0-3]\d"), matches(r"\d{4}-[01]\d-[0-3]\d")),
    "words": Wanted(Grammar(kind="regex", text="(ab+c? ){1,9}"), matches("(ab+c? ){1,9}")),
    "a call": Wanted(
        Grammar(kind="lark", text=f'start: <[{CALL}]> /[a-c]{{1,4}}/ "(" %json {{"type": "boolean"}} ")"'),
        matches(r"\[CALL\][a-c]{1,4}\((true|false)\)"),
    ),
    "letters": Wanted(Grammar(kind="regex", text="[é😀a]{2,9}"), matches("[é😀a]{2,9}")),
}


def ended(events: list[TokenEvent]) -> dict[str, tuple[list[int], FinishReason | None]]:
    """Tokens and end of each request."""
    found: dict[str, tuple[list[int], FinishReason | None]] = {}
    for event in events:
        tokens, _ = found.get(event.request_id, ([], None))
        found[event.request_id] = tokens + event.token_ids, event.finish_reason
    return found


def asks(name: str, prompt: list[int], wanted: Wanted | None, **sampling: object) -> Request:
    given = {"max_tokens": 60, "temperature": 0, "grammar": wanted and wanted.grammar} | sampling
    params = SamplingParams(**given)  # type: ignore[arg-type]
    return Request(request_id=name, prompt_token_ids=prompt, sampling=params)
