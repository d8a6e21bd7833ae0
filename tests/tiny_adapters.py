"""Random LoRA adapters on disk, as PEFT and mistral-finetune write them, and what they add to a model's matrices."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.config import ModelConfig
from tests.tiny_models import interleave, mistral_name

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each module, by its path within a layer."""
    hidden, ffn = model.hidden_size, model.intermediate_size
    return {
        "self_attn.q_proj": (model.q_size, hidden),
        "self_attn.k_proj": (model.kv_size, hidden),
        "self_attn.v_proj": (model.kv_size, hidden),
        "self_attn.o_proj": (hidden, model.q_size),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }


def random_pairs(
    model: ModelConfig, ranks: Mapping[str, int], layers: Sequence[int] | None = None, seed: int = 0
) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """(layer, path) -> A [rank, inputs] and B [outputs, rank], float32; large enough to change what a model says.

    Args:
        ranks: by module: `q_proj`.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for layer in range(model.num_layers) if layers is None else layers:
        for path, (outputs, inputs) in shapes(model).items():
            if rank := ranks.get(path.partition(".")[2]):
                a = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
                b = torch.randn(outputs, rank, generator=generator) * (2 * rank) ** -0.5
                pairs[layer, path] = (a, b)
    return pairs


def write_peft(
    folder: Path,
    model: ModelConfig,
    *,
    rank: int = 4,
    alpha: float = 4.0,
    rslora: bool = False,
    modules: Sequence[str] = MODULES,
    layers: Sequence[int] | None = None,
    ranks: Mapping[str, int] = {},
    alphas: Mapping[str, float] = {},
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> dict[str, Tensor]:
    """adapter_config.json and adapter_model.safetensors.

    Args:
        ranks, alphas: exceptions by module, written as rank_pattern and alpha_pattern.
        config: further keys of the configuration.

    Returns:
        What it adds to each weight, by the weight's Hugging Face name; float64, scale · B · A.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pairs = random_pairs(model, {module: ranks.get(module, rank) for module in modules}, layers, seed)
    tensors, added = {}, {}
    for (layer, path), (a, b) in pairs.items():
        prefix, module = f"model.layers.{layer}.{path}", path.partition(".")[2]
        a, b = a.to(dtype), b.to(dtype)
        tensors[f"base_model.model.{prefix}.lora_A.weight"] = a
        tensors[f"base_model.model.{prefix}.lora_B.weight"] = b
        scale = alphas.get(module, alpha) / (math.sqrt(len(a)) if rslora else len(a))
        added[f"{prefix}.weight"] = scale * b.double() @ a.double()
    save_file(tensors, folder / "adapter_model.safetensors")
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "somewhere/else",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.05,
        "use_rslora": rslora,
        "target_modules": list(modules),
        "rank_pattern": dict(ranks),
        "alpha_pattern": dict(alphas),
        "bias": "none",
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(written | config))
    return added


def write_mistral(folder: Path, model: ModelConfig, *, rank: int = 4, scaling: float = 2.0, seed: int = 0) -> None:
    """params.json and lora.safetensors with the numbers that `write_peft` writes for alpha = rank * scaling."""
    heads = {"self_attn.q_proj": model.num_heads, "self_attn.k_proj": model.num_kv_heads}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for (layer, path), (a, b) in random_pairs(model, dict.fromkeys(MODULES, rank), seed=seed).items():
        prefix = f"layers.{layer}.{mistral_name(path)}"
        tensors[f"{prefix}.lora_A.weight"] = a
        tensors[f"{prefix}.lora_B.weight"] = interleave(b, heads[path]) if path in heads else b
    save_file(tensors, folder / "lora.safetensors")
    (folder / "params.json").write_text(json.dumps({"lora": {"enable": True, "rank": rank, "scaling": scaling}}))
