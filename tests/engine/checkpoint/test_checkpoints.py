"""Checkpoint readers: every form of one model gives the same tensors, and nothing broken gets past opening."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import open_checkpoint
from engine.checkpoint.layout import expected_tensors
from engine.config import ModelConfig
from engine.errors import CheckpointError, UnsupportedModelError
from tests.tiny_models import config_json, random_weights, write_consolidated, write_gguf, write_hf

QWEN = {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name in expected_tensors(checkpoint.config)}


def config(path: Path) -> ModelConfig:
    with open_checkpoint(path) as checkpoint:
        return checkpoint.config


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught, open_checkpoint(path):
        pass
    text = str(caught.value)
    assert "\n" not in text
    return text


# -- the same tensors from every form ------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, QWEN, {"tie_word_embeddings": True}], ids=["mistral", "qwen2", "tied"])
@pytest.mark.parametrize(
    "write",
    [
        lambda folder, **changes: write_hf(folder, **changes),
        lambda folder, **changes: write_hf(folder, shards=3, **changes),
        lambda folder, **changes: write_gguf(folder / "model.gguf", **changes),
    ],
    ids=["whole", "sharded", "gguf"],
)
def test_every_form_gives_the_tensors_that_were_written(
    tmp_path: Path, write: Callable[..., Path], changes: dict[str, Any]
) -> None:
    expected = random_weights(config_json(**changes), seed=3)
    found = tensors(write(tmp_path, seed=3, **changes))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_mistrals_own_form_gives_the_tensors_that_were_written(tmp_path: Path) -> None:
    expected = random_weights(config_json(), seed=4)
    found = tensors(write_consolidated(tmp_path, seed=4))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_folder_with_both_forms_is_read_as_hugging_faces(tmp_path: Path) -> None:
    write_consolidated(write_hf(tmp_path, seed=1), seed=2)
    assert torch.equal(
        tensors(tmp_path)["model.norm.weight"], random_weights(config_json(), seed=1)["model.norm.weight"]
    )


def test_a_single_safetensors_file_is_a_model(tmp_path: Path) -> None:
    assert tensors(write_hf(tmp_path) / "model.safetensors").keys() == tensors(tmp_path).keys()


def retype(path: Path, name: str, kind: int, data: bytes) -> None:
    """Give a tensor of a GGUF file another type and, in place, the data of that type (shorter than what it had)."""
    content = bytearray(path.read_bytes())
    entry = content.index(name.encode()) + len(name)
    [dims] = struct.unpack_from("<I", content, entry)
    struct.pack_into("<I", content, entry + 4 + 8 * dims, kind)
    [tensor] = [each for each in gguf.GGUFReader(path).tensors if each.name == name]
    content[tensor.data_offset : tensor.data_offset + len(data)] = data
    path.write_bytes(content)


def test_the_embedded_model_is_what_its_card_says(smollm2_path: Path) -> None:
    assert config(smollm2_path) == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=49152,
        hidden_size=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        intermediate_size=1536,
        rms_norm_eps=struct.unpack("<f", struct.pack("<f", 1e-5))[0],
        rope_theta=100000.0,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


# -- configuration ------------------------------------------------------------------------------------------------


def test_rope_is_found_where_old_and_new_files_keep_it(tmp_path: Path) -> None:
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = config(write_hf(tmp_path / "old", rope_theta=5e5, rope_scaling=llama3))
    new = config(write_hf(tmp_path / "new", rope_theta=..., rope_parameters={**llama3, "rope_theta": 5e5}))
    assert old == new
    assert new.rope_theta == 5e5
    assert new.rope_scaling is not None


def test_null_means_no_window_and_generation_config_knows_more_ends(tmp_path: Path) -> None:
    folder = write_hf(tmp_path, eos_token_id=2)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert config(folder).sliding_window is None
    assert config(folder).eos_token_ids == (2, 7)
    assert config(write_hf(tmp_path / "windowed", sliding_window=64)).sliding_window == 64


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"architectures": ["Gemma2ForCausalLM"]}, "Gemma2ForCausalLM"),
        ({"architectures": ...}, "architectures"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"type": "yarn"}}, "yarn"),
    ],
)
def test_a_model_that_this_decoder_is_not_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], names: str
) -> None:
    folder = write_hf(tmp_path)
    (folder / "config.json").write_text(json.dumps(config_json(**changes)))
    with pytest.raises(UnsupportedModelError, match=names), open_checkpoint(folder):
        pass


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size '64' must be an integer"),
        ({"hidden_size": -64}, "hidden_size -64"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"num_attention_heads": 5}, "a multiple of num_key_value_heads"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"head_dim": 15}, "head_dim 15 must be even"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": True}, "rope_theta True"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"num_hidden_layers": 3}, r"tensor model.layers.2.\S+ is missing"),
        ({"vocab_size": 161}, r"embed_tokens.weight has shape \[160, 64\], expected \[161, 64\]"),
    ],
)
def test_a_wrong_configuration_names_the_key(tmp_path: Path, changes: dict[str, Any], names: str) -> None:
    folder = write_hf(tmp_path)
    (folder / "config.json").write_text(json.dumps(config_json(**changes)))
    with pytest.raises(CheckpointError, match=names), open_checkpoint(folder):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\xff"])
def test_a_configuration_that_is_no_json_object_is_one_line(tmp_path: Path, text: str) -> None:
    folder = write_hf(tmp_path)
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refusal(folder)


# -- tensors ------------------------------------------------------------------------------------------------------


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight is missing"),
        (lambda w: w.update({"model.layers.0.extra.weight": torch.ones(2)}), "model.layers.0.extra.weight"),
        (lambda w: w.update({"model.norm.weight": torch.ones(63)}), "model.norm.weight has shape"),
        (lambda w: w.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}), "model.norm.weight has dtype I8"),
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_a_wrong_tensor_is_named(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], names: str
) -> None:
    assert names in refusal(change_tensors(write_hf(tmp_path), change))


def test_buffers_that_old_files_carry_are_ignored(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors(change_tensors(write_hf(tmp_path), lambda weights: weights.update({name: torch.ones(8)})))


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_a_truncated_safetensors_file_is_one_line(tmp_path: Path, keep: int) -> None:
    file = write_hf(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "names"),
    [
        ({"x": "../../etc/passwd"}, "not a file of this folder"),
        ({"x": "absent.safetensors"}, "absent.safetensors"),
        ({}, "weight_map"),
        ("x", "weight_map"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, weight_map: object, names: str) -> None:
    folder = write_hf(tmp_path, shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert names in refusal(folder)


@pytest.mark.parametrize("name", ["absent", "absent.gguf", "model.bin"])
def test_what_is_no_model_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.bin").touch()
    assert name in refusal(tmp_path / name)


# -- GGUF files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0.0, 0.001, 0.01, 0.05, 0.5, 0.999])
def test_a_truncated_gguf_is_one_line(tmp_path: Path, part: float) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    assert "m.gguf" in refusal(path)


@pytest.mark.parametrize(
    ("offset", "data", "names"),
    [
        (0, b"GGML", "does not begin with GGUF"),
        (4, struct.pack("<I", 9), "version 9"),
        (8, struct.pack("<Q", 2**60), "tensors, more than"),
        (16, struct.pack("<Q", 2**60), "metadata pairs, more than"),
        (24, struct.pack("<Q", 2**60), "truncated"),
    ],
)
def test_a_hostile_gguf_header_allocates_nothing(tmp_path: Path, offset: int, data: bytes, names: str) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)
    assert names in refusal(path)


def test_a_gguf_type_that_is_not_read_is_named_with_those_that_are(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    retype(path, "blk.0.ffn_up.weight", gguf.GGMLQuantizationType.IQ4_NL.value, b"")
    assert "blk.0.ffn_up.weight has type IQ4_NL; supported are F32" in refusal(path)


@pytest.mark.parametrize("seed", range(4))
def test_any_damage_to_a_gguf_header_is_a_checkpoint_error_or_harmless(tmp_path: Path, seed: int) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    content = path.read_bytes()
    header = gguf.GGUFReader(path).tensors[0].data_offset
    generator = random.Random(seed)
    refused = 0
    for _ in range(120):
        damaged = bytearray(content)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(header)] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            tensors(path)
        except CheckpointError:
            refused += 1
    assert refused > 60
