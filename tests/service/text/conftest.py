"""Tokenizers under test and their oracles, each loaded once."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import tokenizers
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tokenizers import pre_tokenizers

from service.text.bpe import BpeTokenizer, load_tekken
from service.text.load import load_text
from service.text.tokenizer import TextModel

MISTRAL_DATA = Path(mistral_common.__file__).parent / "data"


@pytest.fixture(scope="session")
def mistral_data() -> Path:
    """mistral-common's folder of tokenizer files."""
    return MISTRAL_DATA


@pytest.fixture(scope="session")
def tekken() -> BpeTokenizer:
    return load_tekken(MISTRAL_DATA / "tekken_240718.json")[0]


@pytest.fixture(scope="session")
def mistral_tekken() -> MistralTokenizer:
    """The oracle of Tekken ids and of the v3 chat format."""
    return MistralTokenizer.v3(is_tekken=True)


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> TextModel:
    return load_text(smollm2_path)


@pytest.fixture(scope="session")
def smollm2_oracle(smollm2_path: Path) -> Any:
    """SmolLM2's tokenizer as transformers reads it from the GGUF file; it forgets that digits are split."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(smollm2_path.parent), gguf_file=smollm2_path.name)
    backend: tokenizers.Tokenizer = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


@pytest.fixture(scope="session")
def corpora(test_data: Path) -> dict[str, str]:
    """The Universal Declaration of Human Rights by language."""
    with gzip.open(test_data / "text" / "udhr.json.gz", "rt", encoding="utf-8") as file:
        texts: dict[str, str] = json.load(file)
    return texts
