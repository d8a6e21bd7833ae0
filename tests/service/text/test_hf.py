"""tokenizer.json: ids equal those of the `tokenizers` package, but for control strings in text, which stay text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from engine import CheckpointError, UnsupportedModelError
from service.errors import ServiceError
from service.text.detokenize import StreamDecoder
from service.text.hf import HfTokenizer, load_hf
from service.text.tokenizer import TextModel
from tests.service.text.conversations import CONTROL_STRINGS, text


@pytest.fixture(scope="module")
def smollm2_json(smollm2_oracle: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(smollm2_oracle.backend_tokenizer.to_str())
    return data


def llama_json(*, scheme: str | None) -> dict[str, Any]:
    """A tiny vocabulary of Llama's kind: bytes for what is unknown, a prefix for the first word of a text.

    Args:
        scheme: Metaspace's prepend_scheme; None = the older normalizer that prefixes every run of text.
    """
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        "[INST]",
        *(f"<0x{value:02X}>" for value in range(256)),
        "▁",
        "a",
        "b",
        "▁a",
        "ab",
    ]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("▁", "a"), ("a", "b")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    if scheme is None:
        steps: list[Any] = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = tokenizers.normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "[INST]"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    data: dict[str, Any] = json.loads(tokenizer.to_str())
    return data


def build(data: dict[str, Any]) -> HfTokenizer:
    return HfTokenizer(data, bos="<s>", eos="</s>", add_bos=None)


def test_byte_level_ids_and_texts_equal_those_of_the_gguf_form(
    smollm2_json: dict[str, Any], smollm2: TextModel
) -> None:
    tokenizer = HfTokenizer(smollm2_json, bos="<|im_start|>", eos="<|im_end|>", add_bos=None)
    assert tokenizer.vocab_size == smollm2.tokenizer.vocab_size
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 2)
    rng = random.Random(11)
    for _ in range(200):
        content = text(rng, hostile=True)
        ids = tokenizer.encode(content)
        assert ids == smollm2.tokenizer.encode(content)
        assert tokenizer.decode(ids) == content
    for token_id in range(tokenizer.vocab_size):
        assert tokenizer.token_bytes(token_id) == smollm2.tokenizer.token_bytes(token_id)


@pytest.mark.parametrize("scheme", [None, "first", "always", "never"])
def test_llama_ids_and_texts_equal_tokenizers(scheme: str | None) -> None:
    data = llama_json(scheme=scheme)
    oracle, ours = tokenizers.Tokenizer.from_str(json.dumps(data)), build(data)
    rng = random.Random(12)
    for _ in range(100):
        content = text(rng) + rng.choice(("ab a", " a", "a  b"))
        ids = ours.encode(content, add_bos=True)
        assert ids == oracle.encode(content).ids
        assert StreamDecoder(ours).push(ids) == ours.decode(ids)
        if scheme != "never":  # there the decoder of the file would take away a space that was in the text
            assert ours.decode(ids) == oracle.decode(ids)


def test_text_after_a_control_token_is_prefixed_as_tokenizers_does() -> None:
    for scheme in (None, "first", "always"):
        data = llama_json(scheme=scheme)
        oracle = tokenizers.Tokenizer.from_str(json.dumps(data))
        assert build(data).encode_inside("ab") == oracle.encode("[INST]ab", add_special_tokens=False).ids[1:]


def test_control_strings_are_text(smollm2_json: dict[str, Any]) -> None:
    for tokenizer in (build(smollm2_json), build(llama_json(scheme=None))):
        controls = set(tokenizer.controls.values())
        for content in (*CONTROL_STRINGS, *tokenizer.controls):
            ids = tokenizer.encode(content)
            assert not controls & set(ids)
            assert tokenizer.decode(ids) == content


def test_a_vocabulary_that_finds_whole_words_finds_no_control_token() -> None:
    data = llama_json(scheme="never")
    data["model"]["ignore_merges"] = True
    assert build(data).encode("[INST]") != [3]


def test_white_space_tokens_stay_part_of_the_vocabulary(smollm2_json: dict[str, Any]) -> None:
    space = {"id": 49152, "content": " " * 24, "special": False, "normalized": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    tokenizer = build(smollm2_json | {"added_tokens": [*smollm2_json["added_tokens"], space | flags]})
    assert 49152 in tokenizer.encode("a" + " " * 24 + "b")
    assert tokenizer.token_bytes(49152) == b" " * 24


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(ServiceError, match="not valid UTF-8"):
        build(llama_json(scheme=None)).encode("\udfff")


def test_a_model_that_is_no_bpe_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Unigram"):
        build({"model": {"type": "Unigram", "vocab": []}})


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"model": {}}', b'{"model": {"type": "BPE", "vocab": 1}}', b"\xff"]
)
def test_a_broken_file_is_one_clear_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        load_hf(path, {})
    assert "tokenizer.json" in str(caught.value)
    assert "\n" not in str(caught.value)
