"""`python -m bench.grammar`: what grammars cost on the vocabularies of SmolLM2 and Tekken, and what hostile ones take.

A mask is measured where it is needed: behind each token of a text that fits, for one completion and for 32 at once. The
second completion of a grammar finds what the first has learned. Gaps are how long the thread that compiles nothing, and
only looks now and then whether the grammar is there, was kept from running.
"""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from bench.measure import Machine, this_machine, write_result
from bench.vocabularies import TEKKEN, mistral_file
from engine.errors import InvalidRequestError
from engine.grammar.compiler import Grammars
from engine.grammar.matcher import Matcher
from engine.request import Grammar, SamplingParams
from service.models.store import ModelStore
from service.text.bpe import load_tekken
from service.text.grammar import vocabulary
from service.text.load import load_text
from service.text.tokenizer import Tokenizer

POLL_SECONDS = 0.0005
ROWS = 32
HOSTILE_TOKENS = 20

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street"],
        },
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ADA = """{"name": "Ada Lovelace", "age": 36, "email": "ada@example.com", "tags": ["mathematics", "poetry of numbers"],
 "address": {"street": "St James's Square 12", "zip": "12345"}}"""
FRIENDLY = {
    "a schema": (Grammar(kind="json_schema", text=json.dumps(PERSON)), ADA),
    "any object": (Grammar(kind="json_object"), ADA),
    "an expression": (Grammar(kind="regex", text=r"[a-z0-9.]+@[a-z0-9]+\.(com|org)"), "ada.lovelace@example.com"),
}


def _schema(text: str) -> Grammar:
    return Grammar(kind="json_schema", text=text)


def _regex(text: str) -> Grammar:
    return Grammar(kind="regex", text=text)


def _lark(*rules: str) -> Grammar:
    return Grammar(kind="lark", text="\n".join(rules))


HOSTILE: Mapping[str, Grammar] = {
    "a schema 100 deep": _schema('{"items":' * 100 + "{}" + "}" * 100),
    "5,000 anyOf": _schema('{"anyOf":[' + ",".join(f'{{"const":"c{i}"}}' for i in range(5000)) + "]}"),
    "an enum of 20,000": _schema('{"enum":[' + ",".join(f'"v{i}"' for i in range(20_000)) + "]}"),
    "2,000 properties, all required": _schema(
        json.dumps(
            {
                "type": "object",
                "properties": {f"p{i}": {"type": "integer"} for i in range(2000)},
                "required": [f"p{i}" for i in range(2000)],
            }
        )
    ),
    "a reference to itself": _schema('{"$ref":"#"}'),
    "a circle of references": _schema('{"$defs":{"a":{"allOf":[{"$ref":"#/$defs/a"}]}},"$ref":"#/$defs/a"}'),
    "an allOf of 100 patterns": _schema(
        json.dumps({"allOf": [{"type": "string", "pattern": f".*{i}.*"} for i in range(100)]})
    ),
    "counts in counts": _regex("((((a{1,50}){1,50}){1,50}){1,50}){1,50}"),
    "a count of 100,000": _regex("(ab|cd){100000}"),
    "exponential alternatives": _regex("(a|a)*" * 40 + "b"),
    "the 30th from the end": _regex("(a|b)*a(a|b){30}c"),
    "classes of Unicode": _regex(r"(\p{L}|\p{N}|\w){1,500}" * 8),
    "an expression 5,000 deep": _regex("(" * 5000 + "a" + ")" * 5000),
    "an ambiguous grammar": _lark("start: s", 's: s s | s s s | "a" | "aa"'),
    "rules without end": _lark("start: a", "a: b", "b: a"),
    "rules that double": _lark("start: r0", *(f"r{i}: r{i + 1} r{i + 1}" for i in range(60)), 'r60: "a"'),
    "3,000 special tokens": _lark("start: " + " ".join(["<[3-150]>"] * 3000)),
}


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """A grammar over a vocabulary. Masks in microseconds, of the first completion and of one that follows it."""

    vocabulary: str
    grammar: str
    compile_ms: float
    again_us: float
    masks: int
    first_us: float
    first_longest_us: float
    next_us: float
    next_longest_us: float
    follow_us: float
    rows_ms: float


class Attack(msgspec.Struct, frozen=True, kw_only=True):
    """A hostile grammar. `grown_mb`: how much larger the process became; `reason`: why it was refused, or ended."""

    vocabulary: str
    grammar: str
    compile_ms: float
    longest_gap_ms: float
    longest_mask_ms: float
    grown_mb: int
    reason: str


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A result file."""

    schema: int = 1
    started_at: str
    machine: Machine
    costs: list[Cost]
    attacks: list[Attack]


@click.command()
@click.option("--json", "to", type=click.Path(path_type=Path), help="also write the result to this file")
def main(to: Path | None) -> None:
    """What grammars cost, and what hostile ones take."""
    started_at, machine = datetime.now(UTC).isoformat(timespec="seconds"), this_machine()
    smollm2 = load_text(ModelStore.default().pull("smollm2-135m-instruct").path).tokenizer
    costs, attacks = [], []
    for name, tokenizer in {"SmolLM2": smollm2, "Tekken": load_tekken(mistral_file(TEKKEN))[0]}.items():
        grammars = Grammars(vocabulary(tokenizer), tokenizer.vocab_size, ())
        compiled(grammars, _regex("a"))  # the vocabulary is there
        costs += [cost(name, grammar, grammars, tokenizer) for grammar in FRIENDLY]
        attacks += [attack(name, grammar, grammars, tokenizer) for grammar in HOSTILE]
        grammars.close()
    if to is not None:
        write_result(to, Result(started_at=started_at, machine=machine, costs=costs, attacks=attacks))
    show("Grammars", costs)
    show("Hostile grammars", attacks)


def compiled(grammars: Grammars, grammar: Grammar) -> tuple[Matcher | InvalidRequestError, float]:
    """A completion of the grammar, or why there is none; and the longest gap in seconds."""
    grammars.compile("one", SamplingParams(grammar=grammar))
    longest, last = 0.0, time.perf_counter()
    while not (taken := grammars.take()):
        time.sleep(POLL_SECONDS)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return taken["one"], max(longest, time.perf_counter() - last)


def start(grammars: Grammars, grammar: Grammar) -> Matcher:
    """Raises InvalidRequestError."""
    matcher, _ = compiled(grammars, grammar)
    if isinstance(matcher, InvalidRequestError):
        raise matcher
    return matcher


def cost(name: str, grammar: str, grammars: Grammars, tokenizer: Tokenizer) -> Cost:
    asked, text = FRIENDLY[grammar]
    began = time.perf_counter()
    start(grammars, asked)
    compile_seconds = time.perf_counter() - began
    began = time.perf_counter()
    start(grammars, asked)
    again_seconds = time.perf_counter() - began
    ids, rounds, follows = tokenizer.encode(text), [], []
    for _ in range(2):
        matcher, seconds = start(grammars, asked), []
        for position, token in enumerate(ids):
            began = time.perf_counter()
            grammars.masks({0: (matcher, [])})
            seconds.append(time.perf_counter() - began)
            began = time.perf_counter()
            matcher.follow(position, token)
            follows.append(time.perf_counter() - began)
            assert matcher.error is None, matcher.error
        rounds.append(seconds)
    crowd = [start(grammars, asked) for _ in range(ROWS)]
    for row, matcher in enumerate(crowd):
        for position, token in enumerate(ids[: row % 8]):
            matcher.follow(position, token)
    began = time.perf_counter()
    grammars.masks({row: (matcher, []) for row, matcher in enumerate(crowd)})
    return Cost(
        vocabulary=name,
        grammar=grammar,
        compile_ms=1e3 * compile_seconds,
        again_us=1e6 * again_seconds,
        masks=len(ids),
        first_us=1e6 * statistics.median(rounds[0]),
        first_longest_us=1e6 * max(rounds[0]),
        next_us=1e6 * statistics.median(rounds[1]),
        next_longest_us=1e6 * max(rounds[1]),
        follow_us=1e6 * statistics.median(follows),
        rows_ms=1e3 * (time.perf_counter() - began),
    )


def attack(name: str, grammar: str, grammars: Grammars, tokenizer: Tokenizer) -> Attack:
    before, began, masks = _most_memory(), time.perf_counter(), [0.0]
    matcher, gap = compiled(grammars, HOSTILE[grammar])
    compile_seconds = time.perf_counter() - began
    if isinstance(matcher, Matcher):
        for position in range(HOSTILE_TOKENS):
            if matcher.limit is not None:
                break
            began = time.perf_counter()
            allowed = int.from_bytes(grammars.masks({0: (matcher, [])})[0], "little")
            masks.append(time.perf_counter() - began)
            matcher.follow(position, (allowed & -allowed).bit_length() - 1)
        reason = matcher.error or ""
    else:
        reason = matcher.reason
    return Attack(
        vocabulary=name,
        grammar=grammar,
        compile_ms=1e3 * compile_seconds,
        longest_gap_ms=1e3 * gap,
        longest_mask_ms=1e3 * max(masks),
        grown_mb=_most_memory() - before,
        reason=reason,
    )


def _most_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def show(title: str, rows: list[Cost] | list[Attack]) -> None:
    table = Table(title=title)
    for name in rows[0].__struct_fields__:
        table.add_column(name)
    for row in rows:
        cells = msgspec.structs.astuple(row)
        table.add_row(*(f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
