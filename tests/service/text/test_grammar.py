"""What grammars learn of a tokenizer."""

from __future__ import annotations

from engine import Grammar
from service.text.grammar import choice, vocabulary
from service.text.tools.lark import Rules
from tests.service.fake_engine import EOS, toy_text


def test_ordinary_tokens_have_their_bytes_and_control_tokens_their_names() -> None:
    tokenizer = toy_text().tokenizer
    found = vocabulary(tokenizer)
    assert found.tokens[:256] == [bytes([value]) for value in range(256)]
    assert {found.tokens[token]: token for token in found.special}[b"</s>"] == EOS
    assert len(found.tokens) == tokenizer.vocab_size


def test_control_tokens_are_named_by_their_ids() -> None:
    tokenizer = toy_text().tokenizer
    token = tokenizer.control_id("</s>")
    assert token is not None
    assert Rules().token(token) == f"<[{EOS}]>"
    assert tokenizer.control_id("[TOOL_CALLS]") is None


def test_a_choice_is_between_the_texts_as_they_stand() -> None:
    assert choice(["a", 'say "é"\n']) == Grammar(kind="lark", text='start: "a" | "say \\"\\u00e9\\"\\n"')
