"""Which files of a checkpoint make its text side, and what is said about those that are missing or broken."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest

from engine import CheckpointError
from engine.gguf_header import read_header
from service.text.bpe import byte_alphabet
from service.text.chat import Conversation, Message
from service.text.load import load_text
from service.text.mistral import MistralChat
from service.text.template import TemplateChat
from service.text.tokenizer import TextModel
from tests.service.text.conversations import conversation

HELLO = Conversation(messages=(Message(role="user", content="Hello"),))
INST_TEMPLATE = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"


def write_gguf(path: Path, **changes: Any) -> Path:
    """A GGUF file without tensors; `changes` are tokenizer fields, None removes one."""
    tokens = ["<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"]
    tokens += ["[/TOOL_RESULTS]", "[TOOL_CALLS]", *byte_alphabet(), "ab"]
    fields = {"model": "gpt2", "pre": "tekken", "tokens": tokens, "merges": ["a b"], "bos_token_id": 0}
    fields |= {"eos_token_id": 1, "token_type": [3] * 9 + [1] * 257}
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (fields | changes).items():
        name = f"tokenizer.ggml.{key}" if key != "chat_template" else "tokenizer.chat_template"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif value is not None:
            writer.add_string(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_gguf_metadata_equals_the_reference_reader(smollm2_path: Path) -> None:
    ours = read_header(smollm2_path, lambda key: True).metadata
    fields = gguf.GGUFReader(smollm2_path).fields
    assert ours == {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}


def test_smollm2_loads_with_template_and_stop_ids(smollm2: TextModel) -> None:
    assert isinstance(smollm2.chat, TemplateChat)
    assert smollm2.tokenizer.vocab_size == 49152
    assert (smollm2.tokenizer.bos_id, smollm2.tokenizer.eos_id) == (None, 2)  # add_bos_token is false
    assert smollm2.stop_ids == (smollm2.tokenizer.control_id("<|endoftext|>"),)


def test_a_gguf_of_nemo_speaks_mistrals_own_format(tmp_path: Path) -> None:
    model = load_text(write_gguf(tmp_path / "nemo.gguf", chat_template=INST_TEMPLATE))
    assert isinstance(model.chat, MistralChat)
    assert model.tokenizer.encode("ab", add_bos=True) == [0, 9 + 256]
    assert load_text(write_gguf(tmp_path / "base.gguf")).chat is None


def test_a_directory_with_tokenizer_json_gives_the_ids_of_the_gguf(
    tmp_path: Path, smollm2_oracle: Any, smollm2: TextModel
) -> None:
    assert smollm2.chat is not None
    (tmp_path / "tokenizer.json").write_text(smollm2_oracle.backend_tokenizer.to_str())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    (tmp_path / "chat_template.jinja").write_text(smollm2_oracle.chat_template)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0, 7]}))
    model = load_text(tmp_path)
    assert (model.tokenizer.eos_id, model.stop_ids) == (2, (0, 7))
    assert model.chat is not None
    rng = random.Random(14)
    for _ in range(50):
        asked = conversation(rng, tools=False, hostile=True)
        assert model.chat.encode(asked) == smollm2.chat.encode(asked)


def test_a_tekken_directory_has_chat_unless_its_config_brings_no_template(tmp_path: Path, mistral_data: Path) -> None:
    shutil.copy(mistral_data / "tekken_240718.json", tmp_path / "tekken.json")
    model = load_text(tmp_path)
    assert isinstance(model.chat, MistralChat)
    assert model.chat.encode(HELLO) == [1, 3, *model.tokenizer.encode("Hello"), 4]
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": "<s>"}))  # as the base model's
    assert load_text(tmp_path).chat is None
    config.write_text(json.dumps({"bos_token": "<s>", "chat_template": INST_TEMPLATE}))
    assert isinstance(load_text(tmp_path).chat, MistralChat)


@pytest.mark.parametrize(
    ("file", "name", "has_chat"),
    [
        ("mistral_instruct_tokenizer_240323.model.v3", "tokenizer.model.v3", True),
        ("mistral_instruct_tokenizer_240323.model.v3", "tokenizer.model", True),
        ("tokenizer.model.v1", "tokenizer.model.v1", True),
        ("tokenizer.model.v1", "tokenizer.model", False),  # Llama 2 has this name too
    ],
)
def test_a_directory_with_a_sentencepiece_model(
    tmp_path: Path, mistral_data: Path, file: str, name: str, has_chat: bool
) -> None:
    shutil.copy(mistral_data / file, tmp_path / name)
    model = load_text(tmp_path)
    assert (model.chat is not None) == has_chat
    assert model.tokenizer.decode(model.tokenizer.encode("Hello")) == "Hello"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pre": "mystery"}, "unknown pre-tokeniser 'mystery'"),
        ({"model": "bert"}, "'bert' in GGUF is not supported"),
        ({"merges": None}, "tokenizer.ggml.merges"),
        ({"tokens": "abc"}, "token types for 3 tokens"),
        ({"tokens": 7}, "wrong type"),
        ({"token_type": [1]}, "1 token types for 266"),
        ({"eos_token_id": 999}, "999 is not in the vocabulary"),
        ({"merges": ["b a"]}, "not in the vocabulary"),
        ({"chat_template": "{% for %}"}, "chat template"),
    ],
)
def test_bad_gguf_metadata_is_one_clear_line(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", **changes)
    with pytest.raises(CheckpointError) as caught:
        load_text(path)
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_or_scrambled_gguf_is_a_clear_error_wherever_it_breaks(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf", chat_template="x" * 300).read_bytes()
    broken = tmp_path / "broken.gguf"
    rng = random.Random(15)
    for size in (0, 3, 4, 23, *(rng.randrange(24, len(whole)) for _ in range(60))):
        broken.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"broken\.gguf"):
            load_text(broken)
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(min(len(data), 600))] = rng.randrange(256)
        broken.write_bytes(data)
        try:
            load_text(broken)
        except CheckpointError as error:
            assert "\n" not in str(error)  # noqa: PT017 - a change that does no harm is fine too


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("tokenizer_config.json", b"{", "not valid JSON"),
        ("tokenizer_config.json", b"[]", "not a JSON object"),
        ("tokenizer_config.json", b'{"chat_template": 7}', "chat_template is not text"),
        ("generation_config.json", b"\xff", "not valid JSON"),
        ("chat_template.jinja", b"\xff", "cannot be read"),
        ("tokenizer.json", b"{}", "not a tokenizer"),
        ("README.md", b"", "neither tekken.json nor tokenizer.json nor tokenizer.model"),
    ],
)
def test_a_directory_with_a_bad_file_is_one_clear_line(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_text(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.gguf: no such file"):
        load_text(tmp_path / "nothing.gguf")


def test_the_text_side_needs_no_torch() -> None:
    code = (
        "import service.text.load, service.text.stop, service.text.detokenize, sys; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
