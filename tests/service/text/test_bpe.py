"""Byte-level BPE: ids of Tekken and of GPT-2-style vocabularies equal those of the reference tokenizers."""

from __future__ import annotations

import base64
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tokenizers import Regex, models, pre_tokenizers

from engine import CheckpointError, UnsupportedModelError
from engine.gguf_header import read_header
from service.errors import Code, ServiceError
from service.text.bpe import PATTERNS, BpeTokenizer, byte_alphabet, from_merges, load_tekken
from service.text.tokenizer import TextModel
from tests.service.text.conversations import CONTROL_STRINGS, text

ALPHABET = byte_alphabet()


def spelled(data: bytes) -> str:
    return "".join(ALPHABET[byte] for byte in data)


def test_tekken_ids_equal_mistral_common(tekken: BpeTokenizer, mistral_tekken: MistralTokenizer) -> None:
    oracle = mistral_tekken.instruct_tokenizer.tokenizer
    rng = random.Random(0)
    for _ in range(500):
        content = text(rng, hostile=True)
        assert tekken.encode(content) == oracle.encode(content, bos=False, eos=False), repr(content)


def test_tekken_ids_equal_mistral_common_in_twelve_languages(
    tekken: BpeTokenizer, mistral_tekken: MistralTokenizer, corpora: dict[str, str]
) -> None:
    oracle = mistral_tekken.instruct_tokenizer.tokenizer
    for language, content in corpora.items():
        assert tekken.encode(content, add_bos=True) == oracle.encode(content, bos=True, eos=False), language


def test_smollm2_ids_equal_transformers(smollm2: TextModel, smollm2_oracle: Any) -> None:
    rng = random.Random(1)
    for _ in range(500):
        content = text(rng)
        assert smollm2.tokenizer.encode(content) == smollm2_oracle.encode(content), repr(content)


def test_smollm2_ids_equal_transformers_on_corpora(
    smollm2: TextModel, smollm2_oracle: Any, corpora: dict[str, str]
) -> None:
    code = Path(tokenizers.__file__).read_text() + Path(json.__file__).read_text()
    for name, content in (corpora | {"code": code}).items():
        assert smollm2.tokenizer.encode(content) == smollm2_oracle.encode(content), name


@pytest.fixture(scope="module")
def smollm2_fields(smollm2_path: Path) -> dict[str, Any]:
    return read_header(smollm2_path, lambda key: key.startswith("tokenizer.ggml.")).metadata


@pytest.mark.parametrize("pre", sorted(PATTERNS))
def test_every_pre_tokeniser_gives_the_ids_of_hugging_face(pre: str, smollm2_fields: dict[str, Any]) -> None:
    """One real vocabulary under every pre-tokeniser, beside the `tokenizers` steps that models of that kind ship."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    rest = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = {
        "llama-bpe": rf"{words}|\p{{N}}{{1,3}}|{rest}",
        "llama3": rf"{words}|\p{{N}}{{1,3}}|{rest}",
        "qwen2": rf"{words}|\p{{N}}|{rest}",
        "tekken": PATTERNS["tekken"],  # that this one is right is the next test
    }
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in split)]
    if pre in split:
        steps.insert(0, pre_tokenizers.Split(Regex(split[pre]), "isolated"))
    elif pre != "gpt-2":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    vocabulary, merges = smollm2_fields["tokenizer.ggml.tokens"], smollm2_fields["tokenizer.ggml.merges"]
    pairs = [tuple(merge.split(" ")) for merge in merges]
    oracle = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=pairs))
    oracle.pre_tokenizer = pre_tokenizers.Sequence(steps)
    ours = from_merges(vocabulary=vocabulary, merges=merges, control_ids=range(17), pre=pre, bos_id=None, eos_id=None)
    rng = random.Random(2)
    for _ in range(300):
        content = text(rng, hostile=True)
        assert ours.encode(content) == oracle.encode(content).ids, repr(content)


def test_our_tekken_pattern_is_the_one_in_the_file(mistral_data: Path) -> None:
    config = json.loads((mistral_data / "tekken_240718.json").read_bytes())["config"]
    assert config["pattern"] == PATTERNS["tekken"]


def test_tekken_as_a_merge_list_gives_the_same_ids(tekken: BpeTokenizer) -> None:
    """As NeMo's GGUF and HF files write Tekken: for every token all pairs that make it, in rank order."""
    first, count = 1000, 6000
    words = [tekken.token_bytes(first + rank) for rank in range(count)]
    known = set(words)
    merges = [
        f"{spelled(word[:cut])} {spelled(word[cut:])}"
        for word in words[256:]
        for cut in range(1, len(word))
        if word[:cut] in known and word[cut:] in known
    ]
    assert len(merges) > count  # some tokens are made by several pairs
    controls = [tekken.token_name(i) for i in range(first)]
    ours = from_merges(
        vocabulary=[*controls, *map(spelled, words)],
        merges=merges,
        control_ids=range(first),
        pre="tekken",
        bos_id=1,
        eos_id=2,
    )
    reference = BpeTokenizer(
        tokens={first + rank: word for rank, word in enumerate(words)},
        order=range(first, first + count),
        controls=ours.controls,
        pattern=PATTERNS["tekken"],
        bos_id=1,
        eos_id=2,
    )
    rng = random.Random(3)
    for _ in range(200):
        content = text(rng, hostile=True)
        assert ours.encode(content) == reference.encode(content)


def test_ranks_come_from_the_merges_not_from_the_ids() -> None:
    vocabulary = [*ALPHABET, "abc", "bc", "ab"]  # ids in another order than merges
    ours = from_merges(
        vocabulary=vocabulary, merges=["b c", "a b", "a bc"], control_ids=[], pre="gpt-2", bos_id=None, eos_id=None
    )
    oracle = tokenizers.Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(vocabulary)}, merges=[("b", "c"), ("a", "b"), ("a", "bc")])
    )
    for content in ("abc", "ab", "abab", "abcab", "bcbc"):
        assert ours.encode(content) == oracle.encode(content).ids


@pytest.mark.parametrize(
    ("merges", "extra", "reason"),
    [
        (["a b", "ab c", "b c", "a bc"], ["ab", "abc", "bc"], "two places"),
        (["ab c", "a b"], ["ab", "abc"], "made later"),
        (["a b"], [], "not in the vocabulary"),
        ([], ["ab"], "made by no merge"),
        ([], ["a"], "same spelling"),
    ],
)
def test_vocabularies_that_ranks_cannot_express_are_refused(merges: list[str], extra: list[str], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        from_merges(
            vocabulary=[*ALPHABET, *extra], merges=merges, control_ids=[], pre="gpt-2", bos_id=None, eos_id=None
        )


def test_an_unknown_pre_tokeniser_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="'mystery'"):
        from_merges(vocabulary=ALPHABET, merges=[], control_ids=[], pre="mystery", bos_id=None, eos_id=None)


def test_control_strings_in_text_are_text(tekken: BpeTokenizer, smollm2: TextModel) -> None:
    for tokenizer in (tekken, smollm2.tokenizer):
        assert isinstance(tokenizer, BpeTokenizer)
        controls = set(tokenizer.controls.values())
        for content in (*CONTROL_STRINGS, *tokenizer.controls):
            ids = tokenizer.encode(content)
            assert not controls & set(ids)
            assert tokenizer.decode(ids) == content


def test_text_survives_the_round_trip(tekken: BpeTokenizer, corpora: dict[str, str]) -> None:
    for content in (*corpora.values(), "".join(map(chr, range(0, 0xD800, 7))), "\x00\x7f\U0010ffff"):
        ids = tekken.encode(content)
        assert tekken.decode(ids) == content
        assert b"".join(map(tekken.token_bytes, ids)) == content.encode()


def test_characters_that_the_vocabulary_lacks_are_dropped_as_by_the_reference(
    smollm2: TextModel, smollm2_oracle: Any
) -> None:
    assert smollm2.tokenizer.encode("a \x04 b") == smollm2_oracle.encode("a \x04 b")
    assert smollm2.tokenizer.decode(smollm2.tokenizer.encode("a\x04b")) == "ab"


@pytest.mark.parametrize("unit", ["a", " ", "\n", "5", "é", "!", " \n", " a", "中", "\u0301"])
def test_a_megabyte_of_one_thing_is_encoded_in_time(tekken: BpeTokenizer, smollm2: TextModel, unit: str) -> None:
    content = unit * (1_000_000 // len(unit)) + "x"
    for tokenizer in (tekken, smollm2.tokenizer):
        start = time.process_time()
        ids = tokenizer.encode(content)
        assert time.process_time() - start < 5.0
        assert tokenizer.decode(ids) == content


def test_lone_surrogates_are_refused_with_their_position(tekken: BpeTokenizer) -> None:
    with pytest.raises(ServiceError, match=r"prompt: not valid UTF-8: lone surrogate U\+D800 at character 2") as caught:
        tekken.encode("ab\ud800")
    assert (caught.value.code, caught.value.field) == (Code.INVALID_ARGUMENT, "prompt")


@pytest.mark.parametrize("token_id", [-1, 131072])
def test_an_id_outside_the_vocabulary_is_an_error(tekken: BpeTokenizer, token_id: int) -> None:
    with pytest.raises(ValueError, match=str(token_id)):
        tekken.token_bytes(token_id)


def tekken_file(**changes: Any) -> bytes:
    vocab = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None} for i in range(256)]
    config = {"pattern": r"\s+|\S+", "default_vocab_size": 266, "default_num_special_tokens": 10, "version": "v3"}
    return json.dumps({"config": config, "vocab": vocab} | changes).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        tekken_file(vocab=[]),
        tekken_file(config={}),
        tekken_file(vocab=[{"rank": 0, "token_bytes": "!"}] * 256),
        tekken_file(vocab=[{"rank": 0, "token_bytes": "AA=="}] * 256),
        tekken_file(config=json.loads(tekken_file())["config"] | {"pattern": "("}),
    ],
    ids=range(10),
)
def test_a_broken_tekken_file_is_one_clear_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "tekken.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        load_tekken(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_smallest_tekken_file_loads(tmp_path: Path) -> None:
    path = tmp_path / "tekken.json"
    path.write_bytes(tekken_file())
    tokenizer, version = load_tekken(path)
    assert (tokenizer.vocab_size, version) == (266, "v3")
    assert tokenizer.encode("a", add_bos=True) == [1, 10 + ord("a")]
