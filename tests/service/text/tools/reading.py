"""Formats under test, and what their parsers make of a model's words: texts, and names of control tokens where the
format knows them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from service.text.chat import ToolCallDelta
from service.text.tools.format import ToolFormat
from service.text.tools.hermes import HermesTools
from service.text.tools.llama import LlamaTools
from service.text.tools.mistral import MistralTools

TOKENS = {
    "[TOOL_CALLS]": 9,
    "[CALL_ID]": 32,
    "[ARGS]": 33,
    "<tool_call>": 40,
    "</tool_call>": 41,
    "<|python_tag|>": 50,
}
KNOWN = {
    "mistral v3": ("[TOOL_CALLS]",),
    "mistral v11": ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    "mistral v13": ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    "hermes tokens": ("<tool_call>", "</tool_call>"),
    "hermes text": (),
    "llama": ("<|python_tag|>",),
}


def _ids(name: str) -> dict[str, int]:
    return {token: TOKENS[token] for token in KNOWN[name]}


FORMATS: dict[str, ToolFormat] = {
    "mistral v3": MistralTools(_ids("mistral v3"), listed=True, with_ids=False),
    "mistral v11": MistralTools(_ids("mistral v11"), listed=False, with_ids=True),
    "mistral v13": MistralTools(_ids("mistral v13"), listed=False, with_ids=False),
    "hermes tokens": HermesTools(_ids("hermes tokens")),
    "hermes text": HermesTools({}),
    "llama": LlamaTools(_ids("llama")),
}
OFFERED = ("weather", "get_time", "f-1")


@dataclass
class Call:
    id: str
    name: str
    arguments: str = ""

    @property
    def said(self) -> tuple[str, str]:
        return self.name, self.arguments


@dataclass
class Read:
    text: str = ""
    calls: list[Call] = field(default_factory=list)
    pieces: list[list[ToolCallDelta]] = field(default_factory=list)

    @property
    def said(self) -> tuple[str, list[tuple[str, str]]]:
        return self.text, [call.said for call in self.calls]


def read(name: str, words: Sequence[str], *, only_one: bool = False) -> Read:
    """What comes of words in the format of that name."""
    parser = FORMATS[name].parser(OFFERED, only_one=only_one)
    made = Read()
    said = [parser.push(TOKENS[word], "") if word in KNOWN[name] else parser.push(-1, word) for word in words]
    for text, deltas in [*said, parser.finish()]:
        made.text += text
        made.pieces.append(deltas)
        for delta in deltas:
            if delta.name:
                assert delta.call == len(made.calls), "calls are numbered as they begin"
                made.calls.append(Call(delta.id, delta.name))
            assert delta.call == len(made.calls) - 1, "arguments belong to the call that began last"
            made.calls[-1].arguments += delta.arguments
    assert parser.spoken.calls == len(made.calls)
    return made


def cut(name: str, words: Sequence[str], rng: random.Random) -> list[str]:
    """The same words in other pieces, some of them empty."""
    pieces: list[str] = []
    for word in words:
        if word in KNOWN[name]:
            pieces.append(word)
            continue
        cuts = sorted(rng.randint(0, len(word)) for _ in range(rng.randint(0, 2 * len(word))))
        pieces += [word[start:end] for start, end in pairwise([0, *cuts, len(word)])]
    return pieces
