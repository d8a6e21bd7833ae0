"""Tokenizers that are measured side by side: ours, and the libraries that others use for the same vocabularies."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engine.gguf_header import read_header
from service.text.bpe import load_tekken
from service.text.hf import load_hf
from service.text.load import load_text
from service.text.sentencepiece import load_sentencepiece

TEKKEN = "tekken_240718.json"  # of Mistral NeMo


@dataclass(frozen=True, slots=True)
class Peer:
    """A tokenizer under test. Peers of one `vocabulary` should give the same ids."""

    vocabulary: str
    name: str
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def mistral_file(name: str) -> Path:
    """One of the tokenizer files that mistral-common carries (a development dependency)."""
    import mistral_common

    return Path(mistral_common.__file__).parent / "data" / name


def mistral_peers() -> list[Peer]:
    """Both vocabularies of Mistral, from the files that mistral-common carries."""
    import sentencepiece
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    from transformers.integrations.mistral import convert_tekken_tokenizer  # type: ignore[attr-defined]

    tekken_file, model_file = mistral_file(TEKKEN), mistral_file("mistral_instruct_tokenizer_240323.model.v3")
    tekken, older = load_tekken(tekken_file)[0], load_sentencepiece(model_file)
    theirs, theirs_older = Tekkenizer.from_file(tekken_file), SentencePieceTokenizer(str(model_file))
    bare = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    return [
        Peer("Tekken", "nemoserve", tekken.encode, tekken.decode),
        Peer("Tekken", "mistral-common", partial(theirs.encode, bos=False, eos=False), theirs.decode),
        _hf_peer("Tekken", convert_tekken_tokenizer(str(tekken_file)).backend_tokenizer),
        Peer("SentencePiece", "nemoserve", older.encode, older.decode),
        Peer(
            "SentencePiece",
            "mistral-common",
            partial(theirs_older.encode, bos=False, eos=False),
            theirs_older.decode,
        ),
        Peer("SentencePiece", "sentencepiece", bare.EncodeAsIds, bare.DecodeIds),
    ]


def smollm2_peers() -> list[Peer]:
    """The vocabulary of the embedded model: from its GGUF file, and as a tokenizer.json made of the same lists."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from service.models.store import ModelStore

    path = ModelStore.default().pull("smollm2-135m-instruct").path
    fields = read_header(path, lambda key: key.startswith("tokenizer.ggml.")).metadata
    vocabulary = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    theirs = Tokenizer(models.BPE(vocabulary, merges))
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    theirs.pre_tokenizer = pre_tokenizers.Sequence(split)
    theirs.decoder = decoders.ByteLevel()
    from_gguf = load_text(path).tokenizer
    with tempfile.TemporaryDirectory() as folder:
        theirs.save(str(file := Path(folder) / "tokenizer.json"))
        from_json = load_hf(file, {})
    return [
        Peer("SmolLM2", "nemoserve, GGUF", from_gguf.encode, from_gguf.decode),
        Peer("SmolLM2", "nemoserve, JSON", from_json.encode, from_json.decode),
        _hf_peer("SmolLM2", theirs),
    ]


def _hf_peer(vocabulary: str, tokenizer: Any) -> Peer:
    return Peer(
        vocabulary,
        "tokenizers",
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        partial(tokenizer.decode, skip_special_tokens=False),
    )
