"""Streaming text equals the text of the whole, and no piece ends inside a character."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.text.bpe import BpeTokenizer
from service.text.detokenize import StreamDecoder
from service.text.sentencepiece import SentencePieceTokenizer, load_sentencepiece
from service.text.tokenizer import Tokenizer
from tests.service.text.conversations import text


@pytest.fixture(scope="module")
def mistral_v3(mistral_data: Path) -> SentencePieceTokenizer:
    return load_sentencepiece(mistral_data / "mistral_instruct_tokenizer_240323.model.v3")


def stream(tokenizer: Tokenizer, ids: list[int], rng: random.Random) -> list[str]:
    decoder, out = StreamDecoder(tokenizer), []
    while ids:
        size = rng.randint(1, 4)
        out.append(decoder.push(ids[:size]))
        ids = ids[size:]
    return [*out, decoder.flush()]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.randoms(use_true_random=False))
def test_pieces_join_to_the_text_that_was_encoded(tekken: BpeTokenizer, content: str, rng: random.Random) -> None:
    pieces = stream(tekken, tekken.encode(content), rng)
    assert "".join(pieces) == content
    assert pieces[-1] == ""


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 131071), max_size=30), st.randoms(use_true_random=False))
def test_arbitrary_ids_stream_to_their_whole_decode(tekken: BpeTokenizer, ids: list[int], rng: random.Random) -> None:
    assert "".join(stream(tekken, ids, rng)) == tekken.decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 1500), max_size=30), st.randoms(use_true_random=False))
def test_sentencepiece_ids_stream_to_their_whole_decode(
    mistral_v3: SentencePieceTokenizer, ids: list[int], rng: random.Random
) -> None:
    assert "".join(stream(mistral_v3, ids, rng)) == mistral_v3.decode(ids)


def test_a_character_comes_whole_or_not_at_all(tekken: BpeTokenizer) -> None:
    ids = tekken.encode("👩‍👩‍👧‍👦🇪🇺")
    decoder = StreamDecoder(tekken)
    pieces = [decoder.push([token_id]) for token_id in ids]
    assert "" in pieces  # some token ends inside a character
    assert "\ufffd" not in "".join(pieces)


def test_an_unfinished_character_at_the_end_becomes_one_replacement(tekken: BpeTokenizer) -> None:
    first_bytes = [1000 + byte for byte in "🙂".encode()[:3]]
    decoder = StreamDecoder(tekken)
    assert (decoder.push(first_bytes), decoder.flush()) == ("", "\ufffd")


def test_the_sentencepiece_space_goes_after_a_control_token_and_stays_inside_text(
    mistral_v3: SentencePieceTokenizer,
) -> None:
    answer = mistral_v3.encode("Paris is")
    end_of_prompt = mistral_v3.controls["[/INST]"]
    assert StreamDecoder(mistral_v3, [end_of_prompt]).push(answer) == "Paris is"
    assert StreamDecoder(mistral_v3, mistral_v3.encode("It is")).push(answer) == " Paris is"


def test_sentencepiece_pieces_join_to_the_text(mistral_v3: SentencePieceTokenizer) -> None:
    rng = random.Random(7)
    for _ in range(200):
        content = text(rng, hostile=True)
        assert "".join(stream(mistral_v3, mistral_v3.encode(content), rng)) == content
