"""SentencePiece models: ids and texts of the library, control pieces out of reach of text."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import sentencepiece

from engine import CheckpointError
from service.errors import ServiceError
from service.text.sentencepiece import SentencePieceTokenizer, load_sentencepiece
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


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x0a\xff\xff\xff\xff"])
def test_a_broken_file_is_one_clear_line(tmp_path: Path, data: bytes) -> None:
    broken = tmp_path / "tokenizer.model"
    broken.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        load_sentencepiece(broken)
    assert str(broken) in str(caught.value)
    assert "\n" not in str(caught.value)
