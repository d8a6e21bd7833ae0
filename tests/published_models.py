"""The published relatives of NeMo, small: their own keys of config.json, ratios of sizes, names and shards of files.

Every width is a sixteenth or less of the real one, but heads, their grouping, and what does not scale are kept. Keys
and values are those of each repository's config.json at its release; `shards` is how many files it has.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny_models import interleave, mistral_name, params_json, random_weights

_COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
_MISTRAL = _COMMON | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-05,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
_LLAMA = _MISTRAL | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "hidden_size": 256,
    "intermediate_size": 896,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "vocab_size": 320,
}
_7B = _MISTRAL | {"hidden_size": 256, "intermediate_size": 896, "max_position_embeddings": 32768}


@dataclass(frozen=True)
class Published:
    config: dict[str, Any]
    shards: int = 1


def _without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


MODELS = {
    "Mistral-Nemo-Instruct-2407": Published(
        _MISTRAL
        | {
            "head_dim": 8,  # 128 of 5120 / 32 = 160
            "hidden_size": 320,
            "intermediate_size": 896,
            "max_position_embeddings": 1024000,
            "rope_theta": 1000000.0,
            "transformers_version": "4.43.0.dev0",
            "vocab_size": 512,
        },
        shards=5,
    ),
    "Mistral-NeMo-Minitron-8B-Instruct": Published(
        _MISTRAL
        | {
            "attention_bias": False,
            "head_dim": 8,
            "hidden_size": 256,
            "intermediate_size": 720,
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "rope_theta": 1000000.0,
            "vocab_size": 512,
        },
        shards=4,
    ),
    "Mistral-7B-v0.1": Published(
        _without(_7B, "attention_dropout")
        | {"rope_theta": 10000.0, "sliding_window": 16, "transformers_version": "4.34.0.dev0", "vocab_size": 320},
        shards=2,
    ),
    "Mistral-7B-Instruct-v0.3": Published(_7B | {"rope_theta": 1000000.0, "vocab_size": 384}, shards=3),
    "Mistral-Small-24B-Instruct-2501": Published(
        _MISTRAL
        | {
            "head_dim": 8,
            "hidden_size": 320,
            "intermediate_size": 2048,
            "max_position_embeddings": 32768,
            "rope_theta": 100000000.0,
            "vocab_size": 512,
        },
        shards=10,
    ),
    "Meta-Llama-3-8B-Instruct": Published(
        _LLAMA | {"bos_token_id": 300, "eos_token_id": 301, "max_position_embeddings": 8192}, shards=4
    ),
    "Llama-3.1-8B-Instruct": Published(
        _LLAMA
        | {
            "bos_token_id": 300,
            "eos_token_id": [301, 308, 309],
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
        shards=4,
    ),
    "SmolLM2-135M-Instruct": Published(
        _without(_LLAMA, "sliding_window")
        | {
            "hidden_size": 72,
            "intermediate_size": 192,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "pad_token_id": 2,
            "rope_interleaved": False,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
            "vocab_size": 384,
        }
    ),
}

VISION = {
    "attention_dropout": 0.0,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "image_size": 56,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "model_type": "pixtral",
    "num_attention_heads": 2,
    "num_channels": 3,
    "num_hidden_layers": 1,
    "patch_size": 14,
    "rope_theta": 10000.0,
}
SMALL_31_TEXT = _without(
    MODELS["Mistral-Small-24B-Instruct-2501"].config | {"max_position_embeddings": 131072, "rope_theta": 1000000000.0},
    *("architectures", "bos_token_id", "eos_token_id", "tie_word_embeddings", "torch_dtype"),
)
SMALL_31 = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "image_token_index": 10,
    "model_type": "mistral3",
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "text_config": SMALL_31_TEXT,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": VISION,
    "vision_feature_layer": -1,
}


def shape_of(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with what it leaves to be understood, for `random_weights`."""
    heads = config["num_attention_heads"]
    ends = {"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
    return ends | {"head_dim": config["hidden_size"] // heads} | config


def weights_of(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """As published models have them: bfloat16, and small enough that 32 heads do not drown each other."""
    weights = random_weights(shape_of(config), seed)
    return {
        name: (weight if "norm" in name else weight / 2).to(torch.bfloat16).contiguous()
        for name, weight in weights.items()
    }


def write_shards(folder: Path, tensors: dict[str, Tensor], shards: int, stem: str = "model") -> None:
    """stem-00001-of-0000n.safetensors and their index, the tensors in order; one file without an index if it is one."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        file = f"{stem}-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_published(folder: Path, name: str, seed: int = 0) -> Path:
    """One of MODELS, in Hugging Face's form."""
    model = MODELS[name]
    write_shards(folder, weights_of(model.config, seed), model.shards)
    (folder / "config.json").write_text(json.dumps(model.config, indent=2))
    return folder


def write_mistral(
    folder: Path, config: dict[str, Any], weights: dict[str, Tensor], shards: int = 1, **params: Any
) -> Path:
    """The same weights in Mistral's own form; `params` are changes to params.json, ... for a key that is not there."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors = {}
    for name, weight in weights.items():
        count = heads.get(name.split(".")[-2])
        tensors[mistral_name(name)] = interleave(weight, count) if count else weight
    write_shards(folder, tensors, shards, "consolidated")
    written = params_json(shape_of(config)) | params
    (folder / "params.json").write_text(json.dumps({key: value for key, value in written.items() if value is not ...}))
    return folder
