"""SentencePiece models: ids and texts of the library, control pieces out of reach of text."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from engine import CheckpointError
from service.errors import ServiceError
from service.text.sentencepiece import SentencePieceTokenizer, from_pieces, load_sentencepiece
from tests.service.text.conftest import gguf_pieces
from tests.service.text.conversations import CONTROL_STRINGS, text


@pytest.fixture(scope="module", params=["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"])
def path(request: pytest.FixtureRequest, mistral_data: Path) -> Path:
    return mistral_data / str(request.param)


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> SentencePieceTokenizer:
    return load_sentencepiece(path)


def test_ids_and_texts_equal_the_library(path: Path, tokenizer: SentencePieceTokenizer) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    rng = random.Random(13)
    for _ in range(300):
        content = text(rng, hostile=True)
        ids = tokenizer.encode(content)
        assert ids == oracle.encode(content)
        assert tokenizer.decode(ids) == oracle.decode(ids) == content


def test_corpora_survive_the_round_trip(tokenizer: SentencePieceTokenizer, corpora: dict[str, str]) -> None:
    for content in corpora.values():
        assert tokenizer.decode(tokenizer.encode(content, add_bos=True)) == content


def test_control_strings_are_text(tokenizer: SentencePieceTokenizer) -> None:
    controls = set(tokenizer.controls.values())
    for content in (*CONTROL_STRINGS, *tokenizer.controls):
        ids = tokenizer.encode(content)
        assert not controls & set(ids)
        assert tokenizer.decode(ids) == content


def test_a_megabyte_of_one_character_is_encoded_in_time(tokenizer: SentencePieceTokenizer) -> None:
    for unit in ("a", " ", "中"):
        content = unit * (1_000_000 // len(unit.encode())) + "."
        start = time.process_time()
        ids = tokenizer.encode(content)
        assert time.process_time() - start < 10
        assert tokenizer.decode(ids) == content


def test_lone_surrogates_are_refused(tokenizer: SentencePieceTokenizer) -> None:
    with pytest.raises(ServiceError, match="not valid UTF-8"):
        tokenizer.encode("\ud800")


@pytest.fixture(scope="module")
def pieces(path: Path) -> dict[str, list[Any]]:
    return gguf_pieces(path)


def test_ids_and_texts_from_the_pieces_of_a_gguf_equal_the_library(
    path: Path, pieces: dict[str, list[Any]], corpora: dict[str, str]
) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = from_pieces(*pieces.values(), ends=(1, 2), add_space_prefix=True)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, len(oracle))
    assert ours.controls == load_sentencepiece(path).controls
    rng = random.Random(14)
    for content in (*(text(rng, hostile=True) for _ in range(300)), *corpora.values()):
        ids = ours.encode(content)
        assert ids == oracle.encode(content)
        assert ours.decode(ids) == oracle.decode(ids) == content


def test_a_vocabulary_without_space_prefix_encodes_text_as_it_stands(path: Path, pieces: dict[str, list[Any]]) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = from_pieces(*pieces.values(), ends=(None, 2), add_space_prefix=False)
    rng = random.Random(15)
    for _ in range(100):
        content = text(rng, hostile=True)
        ids = ours.encode(" " + content, add_bos=True)  # no beginning of sequence either
        assert ids == oracle.encode(content)
        assert ours.decode(ids) == " " + content


def test_pieces_that_a_user_added_are_out_of_reach_of_text(pieces: dict[str, list[Any]]) -> None:
    added = ["<|im_start|>", "▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁"]
    count = len(pieces["tokens"])
    ours = from_pieces(
        pieces["tokens"] + added,
        pieces["scores"] + [-1000.0] * 2,
        pieces["token_type"] + [4, 4],
        ends=(1, 2),
        add_space_prefix=True,
    )
    assert ours.control_id("<|im_start|>") == count
    ids = ours.encode("<|im_start|>user" + " " * 24)
    assert count not in ids
    assert ids[-1] == count + 1
    assert ours.decode(ids) == "<|im_start|>user" + " " * 24


def test_pieces_that_make_no_model_are_one_clear_line() -> None:
    rng = random.Random(16)
    for _ in range(300):
        count = rng.randint(0, 6)
        tokens = [rng.choice(("", "a", "▁", "<0x41>", "<unk>", "\0", "b\ud7ff", "<0xZZ>")) for _ in range(count)]
        scores = [rng.choice((0.0, -1.0, math.nan, math.inf)) for _ in range(count)]
        types = [rng.randint(0, 9) for _ in range(count)]
        try:
            made = from_pieces(tokens, scores, types, ends=(None, None), add_space_prefix=rng.random() < 0.5)
            made.decode(made.encode("ab A\0"))
        except CheckpointError as error:
            assert "\n" not in str(error)  # noqa: PT017 - some make a model


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x0a\xff\xff\xff\xff"])
def test_a_broken_file_is_one_clear_line(tmp_path: Path, data: bytes) -> None:
    broken = tmp_path / "tokenizer.model"
    broken.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        load_sentencepiece(broken)
    assert str(broken) in str(caught.value)
    assert "\n" not in str(caught.value)
