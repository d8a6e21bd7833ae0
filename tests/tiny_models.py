"""Tiny random models on disk, in every form that the checkpoint readers know. The same seed gives the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoint.layout import expected_tensors
from engine.config import ModelConfig

# head_dim is not hidden_size / num_heads, as in Mistral NeMo; three query heads share a kv head.
CONFIG: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


# Changes to it: widths that fill the blocks of every format, so that bytes can be compared one by one.
MID: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1280,
    "max_position_embeddings": 4096,
}


def config_json(**changes: Any) -> dict[str, Any]:
    """CONFIG with changes; a key given as ... is left out."""
    return {key: value for key, value in (CONFIG | changes).items() if value is not ...}


def model_config(config: dict[str, Any]) -> ModelConfig:
    """The ModelConfig that a reader should make of `config`, for finding names and shapes."""
    return ModelConfig(
        architecture=config["architectures"][0],
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        intermediate_size=config["intermediate_size"],
        rms_norm_eps=config["rms_norm_eps"],
        rope_theta=config.get("rope_theta", 10000.0),
        max_position_embeddings=config["max_position_embeddings"],
        qkv_bias=config["architectures"] == ["Qwen2ForCausalLM"],
        tie_word_embeddings=config["tie_word_embeddings"],
        bos_token_id=config["bos_token_id"],
        eos_token_ids=(config["eos_token_id"],),
    )


def random_weights(config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights by their Hugging Face names, large enough that logits are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in expected_tensors(model_config(config)).items():
        values = torch.randn(shape, generator=generator) * 0.15
        weights[name] = (values + 1 if "norm" in name else values).to(dtype)
    return weights


def write_hf(
    folder: Path, *, seed: int = 0, shards: int = 1, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A folder with config.json and safetensors; `changes` are made to CONFIG. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_json(**changes)
    weights = random_weights(config, seed, dtype)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in list(weights)[shard::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows from rotate-half order to the interleaved pairs that Mistral's files and llama.cpp store."""
    rows = weight.view(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2)
    return rows.reshape(weight.shape).contiguous()


def _interleaved(name: str, weight: Tensor, config: dict[str, Any]) -> Tensor:
    if ".q_proj." in name:
        return interleave(weight, config["num_attention_heads"])
    return interleave(weight, config["num_key_value_heads"]) if ".k_proj." in name else weight


def write_consolidated(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A folder with params.json and consolidated.safetensors. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_json(**changes)
    weights = {
        mistral_name(name): _interleaved(name, weight, config) for name, weight in random_weights(config, seed).items()
    }
    save_file(weights, folder / "consolidated.safetensors")
    (folder / "params.json").write_text(json.dumps(params_json(config)))
    return folder


def mistral_name(name: str) -> str:
    """What a tensor, or a module, is called in consolidated.safetensors."""
    parts = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "model.embed_tokens": "tok_embeddings",
        "model.norm": "norm",
        "lm_head": "output",
        "model.layers": "layers",
    }
    for ours, theirs in parts.items():
        name = name.replace(ours, theirs)
    return name


def params_json(config: dict[str, Any]) -> dict[str, Any]:
    """The same model as params.json has it."""
    return {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "head_dim": config["head_dim"],
        "hidden_dim": config["intermediate_size"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
        "rope_theta": config["rope_theta"],
        "max_seq_len": config["max_position_embeddings"],
    }


def quantise_gguf(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """float32 rows -> rows of blocks; any blocks of K-quants, to which the gguf package cannot quantise."""
    if not kind.name.endswith("_K"):
        return np.asarray(gguf.quants.quantize(values, kind))
    generator = np.random.default_rng(values.view(np.uint32).ravel()[:4].tolist())
    return random_blocks(kind.name, values.size // 256, generator).reshape(len(values), -1)


def write_gguf(
    path: Path,
    *,
    kind: str = "F32",
    seed: int = 0,
    weights: dict[str, Tensor] | None = None,
    quantise: Callable[[np.ndarray, gguf.GGMLQuantizationType], np.ndarray] = quantise_gguf,
    split_files: int | None = None,
    **changes: Any,
) -> Path:
    """A GGUF file whose matrices have the types of a file of this `kind`; norms and biases stay F32. Returns the file.

    Args:
        weights: by their Hugging Face names; None = random ones.
        split_files: how many files the model is said to lie in.
    """
    config = config_json(**changes)
    qwen = config["architectures"] == ["Qwen2ForCausalLM"]
    writer = gguf.GGUFWriter(path, "qwen2" if qwen else "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config["sliding_window"] is not None:
        writer.add_sliding_window(config["sliding_window"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    if split_files is not None:
        writer.add_uint16("split.count", split_files)
    for name, weight in (weights or random_weights(config, seed)).items():
        values = (weight if qwen else _interleaved(name, weight, config)).numpy()
        wanted = gguf.GGMLQuantizationType[publishers_type(kind, name, weight, config) if weight.ndim == 2 else "F32"]
        writer.add_tensor(gguf_name(name), quantise(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def publishers_type(kind: str, name: str, weight: Tensor, config: dict[str, Any]) -> str:
    """The type that llama.cpp gives a matrix in a file of this kind: a type's own name, or Q4_K_M or Q5_K_M.

    Source: ggml-org/llama.cpp, src/llama-quant.cpp, `llama_tensor_get_type`.
    """
    wanted, layers = kind.removesuffix("_M"), config["num_hidden_layers"]
    if kind.endswith("_M"):
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
        is_head = name == ("model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight")
        if is_head or (more and ("v_proj" in name or "down_proj" in name)):
            wanted = "Q6_K"
    narrow = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # where rows are no whole blocks of 256
    return narrow.get(wanted, wanted) if weight.shape[1] % 256 else wanted


# Where the float16 numbers of a block are, in bytes: its scale, then its minimum.
GGUF_HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def random_blocks(kind: str, count: int, generator: np.random.Generator) -> np.ndarray:
    """uint8 [count, bytes]: any bytes are codes; the scales bring K-quants to a spread of 0.04 about 0."""
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    blocks = generator.integers(0, 256, (count, size), dtype=np.uint8)
    scale = {"Q4_K": 2e-4, "Q5_K": 1e-4, "Q6_K": 3e-5}.get(kind, 0.01) * generator.uniform(0.5, 1.5, (count, 1))
    middle = {"Q4_K": 7.5, "Q5_K": 15.5}.get(kind, -8)  # minima of the K-quants are taken off, of others added
    for at, factor in zip(GGUF_HALVES[kind], (1, middle), strict=False):
        blocks[:, at : at + 2] = (factor * scale).astype("<f2").view(np.uint8)
    return blocks


def dequantised(path: Path, config: ModelConfig) -> dict[str, Tensor]:
    """All tensors of a GGUF file in float32 under their Hugging Face names, as the gguf package reads them."""
    found = {}
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, shape in expected_tensors(config).items():
        tensor = stored[gguf_name(name)]
        values = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32))
        values = values.view(shape)
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
        if heads and config.architecture == "LlamaForCausalLM":
            values = values.view(heads, config.head_dim // 2, 2, -1).transpose(1, 2).reshape(shape)
        found[name] = values
    return found


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "model.layers": "blk",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    for theirs, ours in parts.items():
        name = name.replace(theirs, ours)
    return name
