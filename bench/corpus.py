"""Real text to judge a model by: technical prose, code and many languages, in passages of equal length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import msgspec

from bench.texts import HANDBOOK, RIGHTS, languages, solutions
from service.text.tokenizer import Tokenizer


class Passage(msgspec.Struct, frozen=True):
    """Consecutive tokens of a text of some kind; the first is what the tokenizer begins a text with, if anything."""

    kind: str
    token_ids: list[int]


def texts_by_kind(folder: Path) -> dict[str, list[str]]:
    """`prose` (The Debian Administrator's Handbook, English), `code` (HumanEval) and `languages` (the Universal
    Declaration of Human Rights, a text for each language).

    Raises:
        OSError: a file is missing or cannot be read.
    """
    return {
        "prose": [languages(folder / HANDBOOK)["en"]],
        "code": ["\n\n".join(solutions(folder))],
        "languages": list(languages(folder / RIGHTS).values()),
    }


def cut_passages(texts: Mapping[str, Sequence[str]], tokenizer: Tokenizer, count: int, length: int) -> list[Passage]:
    """`count` passages of `length` tokens, the kinds taking turns, and within a kind its texts.

    Raises:
        ValueError: the texts are too short for so many.
    """
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    queues = [_in_turn([tokenizer.encode(text) for text in each], length - len(start)) for each in texts.values()]
    turns = zip(*queues, strict=False)  # ends with the kind that has the least text
    every = (Passage(kind, start + ids) for turn in turns for kind, ids in zip(texts, turn, strict=True))
    passages = list(islice(every, count))
    if len(passages) < count:
        raise ValueError(f"{count} passages of {length} tokens were asked for, the texts have {len(passages)}")
    return passages


def _in_turn(texts: list[list[int]], length: int) -> Iterator[list[int]]:
    for at in range(0, max(map(len, texts), default=0), length):
        for ids in texts:
            if at + length <= len(ids):
                yield ids[at : at + length]
