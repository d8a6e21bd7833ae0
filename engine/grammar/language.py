"""What a grammar may be: all kinds in one dialect, limits to what one may take, and errors in one line."""

from __future__ import annotations

import json
import re

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark

from engine.request import Grammar, Vocabulary

DEAD_END = "no token of the vocabulary can follow"
MOST_REASON = 300  # characters of what is wrong with a grammar

# Fuel is counted in operations: about 50,000 of a lexer's construction a millisecond, and 14,000 of a mask.
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    max_grammar_size=200_000,
    max_lexer_states=50_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_items_in_row=2_000,
    verbose_errors=False,  # they would repeat the grammar
)

# A model chooses among all spellings of a text that must come, rather than be given one: it knows its own best.
HEADER = '%llguidance {"no_forcing": true}\n'
# Between the parts of a JSON text. Without a bound a small model can write blanks for ever.
WHITESPACE = r"[ \n\t]{0,40}"


def make_tokenizer(vocabulary: Vocabulary, vocab_size: int) -> LLTokenizer:
    """The trie of a vocabulary: of the ids below `vocab_size` of a model, those that it lacks never come. One more id
    is llguidance's own end of text."""
    tokens = _Tokens(vocabulary, vocab_size)
    tokens.made = LLTokenizer(tokens)
    return tokens.made


def compile_grammar(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
    """A matcher at the beginning of a grammar.

    Raises:
        ValueError: says what is wrong with the grammar.
        RecursionError: a schema is nested deeper than Python reads.
    """
    matcher = LLMatcher(tokenizer, to_lark(grammar), log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()  # the first takes longest, and may be too much
    if matcher.is_error():
        raise ValueError(one_line(matcher.get_error(), grammar.kind))
    return matcher


def to_lark(grammar: Grammar) -> str:
    """A grammar of any kind in llguidance's dialect of Lark.

    Raises:
        ValueError: a schema is no JSON, or no schema.
    """
    if grammar.kind == "lark":
        return HEADER + grammar.text
    if grammar.kind == "regex":
        return f"{HEADER}start: /{regex_to_lark(grammar.text, use_ascii='d')}/"  # digits are 0 to 9, as in JSON
    schema = json.loads(grammar.text) if grammar.kind == "json_schema" else {"type": "object"}
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise ValueError("a JSON schema must be an object")
    given = schema.get("x-guidance", {})
    options = {"whitespace_pattern": WHITESPACE} | (given if isinstance(given, dict) else {})
    return f"{HEADER}start: %json {json.dumps(schema | {'x-guidance': options})}"


def one_line(error: str, kind: str = "") -> str:
    """llguidance's message in one line, without its picture of the text; the place in it where a person wrote it."""
    said = error.split("\n<")[0]
    if said == "NoExtensionBias":
        return DEAD_END
    lines = [line.strip() for line in said.splitlines() if not re.match(r"\s*(\d+ \||\^)", line)]

    def place(found: re.Match[str]) -> str:
        return f"line {int(found[1]) - HEADER.count(chr(10))}, column {found[2]}: " if kind == "lark" else ""

    text = re.sub(r"^(?:at )?(\d+)\((\d+)\): ", place, " ".join(filter(None, lines)))
    return text if len(text) <= MOST_REASON else text[:MOST_REASON] + "…"


class _Tokens(TokenizerWrapper):
    """What llguidance wants to know of a tokenizer. It asks for ids of a text only where a grammar says that what must
    come is to be given rather than chosen: then the longest tokens that fit are."""

    is_tokenizer_wrapper = True
    eos_token_id = None  # type: ignore[assignment]  # then llguidance adds one behind the others
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, vocab_size: int) -> None:
        tokens = vocabulary.tokens[:vocab_size]
        self.tokens = tokens + [b""] * (vocab_size - len(tokens))
        self.special_token_ids = [token for token in vocabulary.special if token < vocab_size]
        self.made: LLTokenizer | None = None

    def __call__(self, text: str | bytes) -> list[int]:
        assert self.made is not None
        return self.made.greedy_tokenize(text.decode() if isinstance(text, bytes) else text)
