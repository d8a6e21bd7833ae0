"""Tokenizers under test and their oracles, each loaded once."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import sentencepiece
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

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


def small_tekken(version: str, tokens: int = 8000) -> dict[str, Any]:
    """A tekken.json as Mistral publishes it with that version, of the first tokens of the real vocabulary only.

    From v11 on the file names its control tokens, with [ARGS] and [CALL_ID] in the places that Mistral Small 3.2 has.
    """
    data: dict[str, Any] = json.loads((MISTRAL_DATA / "tekken_240718.json").read_bytes())
    data["config"] |= {"version": version, "default_vocab_size": 1000 + tokens, "num_vocab_tokens": tokens}
    if version not in ("v3", "v7"):
        names = [str(token["token_str"]) for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
        names += [f"<SPECIAL_{number}>" for number in range(len(names), 32)] + ["[ARGS]", "[CALL_ID]"]
        data["special_tokens"] = [{"rank": i, "token_str": n, "is_control": True} for i, n in enumerate(names)]
    return data | {"vocab": data["vocab"][:tokens]}


def gguf_pieces(path: Path) -> dict[str, list[Any]]:
    """The `tokenizer.ggml.*` fields of a SentencePiece model, as llama.cpp's converter writes them."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    kinds = (model.IsUnknown, model.IsControl, model.IsUnused, model.IsByte)
    types = [
        next((kind for kind, test in zip((2, 3, 5, 6), kinds, strict=True) if test(i)), 1) for i in range(len(model))
    ]
    tokens = [model.IdToPiece(i) for i in range(len(model))]
    return {"tokens": tokens, "scores": [model.GetScore(i) for i in range(len(model))], "token_type": types}


@pytest.fixture(scope="session", params=["v7", "v11", "v13"])
def modern_tekken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tekken.json of a model newer than NeMo."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    (folder / "tekken.json").write_text(json.dumps(small_tekken(request.param)))
    return folder


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> TextModel:
    return load_text(smollm2_path)


@pytest.fixture(scope="session")
def corpora(test_data: Path) -> dict[str, str]:
    """The Universal Declaration of Human Rights by language."""
    with gzip.open(test_data / "text" / "udhr.json.gz", "rt", encoding="utf-8") as file:
        texts: dict[str, str] = json.load(file)
    return texts
