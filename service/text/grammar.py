"""What the text side has to say about grammars: the vocabulary that they are over, and choices."""

from __future__ import annotations

import json
from collections.abc import Sequence

from engine import Grammar, Vocabulary
from service.text.tokenizer import Tokenizer


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Bytes of all tokens, as `engine.Engine.set_vocabulary` wants them. Control tokens have their names."""
    tokens: list[bytes] = []
    special: list[int] = []
    for token in range(tokenizer.vocab_size):
        data = tokenizer.token_bytes(token)
        if not data and (name := tokenizer.token_name(token)):
            special.append(token)
            data = name.encode()
        tokens.append(data)
    return Vocabulary(tokens=tokens, special=special)


def choice(texts: Sequence[str]) -> Grammar:
    """One of some texts, which are not empty."""
    return Grammar(kind="lark", text="start: " + " | ".join(json.dumps(text) for text in texts))
