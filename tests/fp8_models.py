"""Tiny FP8 checkpoints, each written as its publisher writes it; and the floats that its formula makes of the codes.

The formulas are the publishers' own, written here without the readers: codes times the scale of their tensor, of their
row, or of their block of 128 x 128.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny_models import config_json, interleave, mistral_name, params_json, random_weights

E4M3_MAX = 448.0
Quantise = Callable[[Tensor], tuple[Tensor, Tensor]]


def per_tensor(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().max() / E4M3_MAX
    return (weight / scale).to(torch.float8_e4m3fn), scale


def per_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / E4M3_MAX
    return (weight / scale).to(torch.float8_e4m3fn), scale


def per_block(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of 128 x 128, those at the edges smaller."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    scale = torch.empty(rows, columns)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for row in range(rows):
        for column in range(columns):
            at = (slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128))
            codes[at], scale[row, column] = per_tensor(weight[at])
    return codes, scale


def dequantise(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 of any of the three."""
    if scale.numel() in (1, len(codes)):
        return codes.float() * scale.float().reshape(-1, 1)
    return codes.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: codes.shape[0], : codes.shape[1]]


@dataclass(frozen=True)
class Dialect:
    """How a publisher writes FP8.

    Attributes:
        config: what it adds to config.json.
        beside: another file, and what is in it.
        shape: of scales of weights, None = as they come.
        inputs: the name of the scale of inputs, None = there is none.
        kv: names of scales for the cache, in each attention.
        changes: to the configuration of the model.
    """

    config: dict[str, Any]
    quantise: Quantise
    weight_scale: str = "weight_scale"
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    inputs: str | None = None
    kv: tuple[str, ...] = ()
    beside: tuple[str, dict[str, Any]] | None = None
    changes: dict[str, Any] = field(default_factory=dict)


def _group(per: str, blocks: list[int] | None = None, **inputs: Any) -> dict[str, Any]:
    float8 = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "block_structure": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": 1.5,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.0",
        "config_groups": {
            "group_0": {
                "format": "float-quantized",
                "targets": ["Linear"],
                "weights": {**float8, "strategy": per, "block_structure": blocks, "dynamic": False},
                "input_activations": {**float8, **inputs} if inputs else None,
                "output_activations": None,
            }
        },
    }


_BLOCKS = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 10}
_KV8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
_MODELOPT = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}

DIALECTS = {
    "autofp8-static": Dialect(  # RedHatAI/Mistral-Nemo-Instruct-2407-FP8
        {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}},
        per_tensor,
        inputs="input_scale",
    ),
    "autofp8-dynamic": Dialect(
        {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]}},
        per_tensor,
    ),
    "autofp8-kv": Dialect(
        {
            "quantization_config": {
                "quant_method": "fp8",
                "activation_scheme": "static",
                "kv_cache_scheme": "static",
                "ignored_layers": ["re:.*lm_head"],
            }
        },
        per_tensor,
        inputs="input_scale",
        kv=("kv_scale",),
    ),
    "fp8-blocks": Dialect(
        {
            "quantization_config": {
                "quant_method": "fp8",
                "activation_scheme": "dynamic",
                "weight_block_size": [128, 128],
            }
        },
        per_block,
        weight_scale="weight_scale_inv",
        changes=_BLOCKS,
    ),
    "fp8-mistral": Dialect(  # as Mistral writes Hugging Face's form
        {
            "quantization_config": {
                "quant_method": "fp8",
                "activation_scheme": "static",
                "dequantize": False,
                "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
                "weight_block_size": None,
            }
        },
        per_tensor,
        weight_scale="weight_scale_inv",
        inputs="activation_scale",
        dtype=torch.bfloat16,
    ),
    "compressed-static": Dialect(
        {"quantization_config": _group("tensor", strategy="tensor", dynamic=False) | {"kv_cache_scheme": _KV8}},
        per_tensor,
        shape=(1,),
        inputs="input_scale",
        kv=("k_scale", "v_scale"),
    ),
    "compressed-dynamic": Dialect(
        {"compression_config": _group("channel", strategy="token", dynamic=True)},
        per_channel,
        dtype=torch.bfloat16,
    ),
    "compressed-weights-only": Dialect({"quantization_config": _group("channel")}, per_channel),
    "compressed-blocks": Dialect(
        {"quantization_config": _group("block", [128, 128], strategy="group", group_size=128, dynamic=True)},
        per_block,
        changes=_BLOCKS,
    ),
    "modelopt": Dialect(
        {},
        per_tensor,
        inputs="input_scale",
        kv=("k_proj.k_scale", "v_proj.v_scale"),
        beside=(
            "hf_quant_config.json",
            {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": _MODELOPT},
        ),
    ),
    "modelopt-config": Dialect(
        {
            "quantization_config": {
                "quant_method": "modelopt",
                "quant_algo": "FP8",
                "config_groups": {
                    "group_0": {
                        "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
                        "weights": {"dynamic": False, "num_bits": 8, "type": "float"},
                        "targets": ["Linear"],
                    }
                },
                "ignore": ["lm_head"],
                "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
                "producer": {"name": "modelopt", "version": "0.33.0"},
            }
        },
        per_tensor,
        inputs="input_scale",
        kv=("k_proj.output_scale", "v_proj.output_scale"),
    ),
    "modelopt-channels": Dialect(
        {},
        per_channel,
        beside=(
            "hf_quant_config.json",
            {
                "producer": {"name": "modelopt"},
                "quantization": _MODELOPT
                | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "exclude_modules": ["lm_head*"]},
            },
        ),
        shape=(-1,),
    ),
}


@dataclass(frozen=True)
class Written:
    """A checkpoint on disk, and what it should mean.

    Attributes:
        weights: float32 by their names in Hugging Face's form.
        inputs: static scales, by name of module.
    """

    folder: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]
    inputs: dict[str, float]


def write_fp8(folder: Path, kind: str, *, seed: int = 0, shared_inputs: bool = True, **changes: Any) -> Written:
    """A folder in Hugging Face's form, `kind` of DIALECTS; linear maps of layers in FP8, the rest in bfloat16.

    Args:
        shared_inputs: projections of the same vector have the same scale for it, as calibration gives it.
    """
    dialect = DIALECTS[kind]
    config = config_json(**{"torch_dtype": "bfloat16", **dialect.changes, **changes})
    stored: dict[str, Tensor] = {}
    weights, inputs = {}, {}
    for name, weight in random_weights(config, seed, torch.bfloat16).items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            stored[name], weights[name] = weight, weight.float()
            continue
        stored[name], scale = dialect.quantise(weight.float())
        scale = scale.to(dialect.dtype)
        weights[name] = dequantise(stored[name], scale)
        stored[f"{module}.{dialect.weight_scale}"] = scale if dialect.shape is None else scale.reshape(dialect.shape)
        if dialect.inputs:
            inputs[module] = input_scale(module, shared_inputs)
            value = torch.tensor(inputs[module]).to(dialect.dtype)
            inputs[module] = value.item()
            stored[f"{module}.{dialect.inputs}"] = value if dialect.shape is None else value.reshape(dialect.shape)
    for layer in range(config["num_hidden_layers"]):
        for each in dialect.kv:
            stored[f"model.layers.{layer}.self_attn.{each}"] = torch.tensor([0.0625 * (layer + 1)])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | dialect.config))
    if dialect.beside:
        (folder / dialect.beside[0]).write_text(json.dumps(dialect.beside[1]))
    save_file(stored, folder / "model.safetensors")
    return Written(folder, config, weights, inputs)


def input_scale(module: str, shared: bool) -> float:
    """Like that of a calibration: the layers' hidden vectors are of size 4 or so."""
    place = module.split(".")
    return (0.01 + 0.001 * int(place[2])) * (1.0 if shared else 1.0 + 0.13 * "qkvogud".index(place[4][0]))


def write_mistral_fp8(
    folder: Path, *, static: bool, quantise: Quantise = per_tensor, seed: int = 0, **changes: Any
) -> Written:
    """Mistral's own form: params.json with `quantization`, consolidated.safetensors with `qscale_weight`."""
    config = config_json(**changes)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    stored: dict[str, Tensor] = {}
    weights, inputs = {}, {}
    for name, weight in random_weights(config, seed, torch.bfloat16).items():
        module = name.removesuffix(".weight")
        count = heads.get(module.rpartition(".")[2])
        ordered = interleave(weight, count) if count else weight
        if not module.endswith("_proj"):
            stored[mistral_name(name)], weights[name] = ordered, weight.float()
            continue
        codes, scale = quantise(ordered.float())
        meant = dequantise(codes, scale)
        weights[name] = deinterleave(meant, count) if count else meant
        theirs = mistral_name(module)
        stored |= {f"{theirs}.weight": codes, f"{theirs}.qscale_weight": scale}
        if static:
            inputs[module] = torch.tensor(input_scale(module, shared=True)).item()
            stored[f"{theirs}.qscale_act"] = torch.tensor(inputs[module])
    if static:
        for layer in range(config["num_hidden_layers"]):
            for each in ("k", "v"):
                stored[f"layers.{layer}.attention.{each}_fake_quantizer.qscale_act"] = torch.tensor(0.5)
    folder.mkdir(parents=True, exist_ok=True)
    scheme = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR" if static else "NO_SCALES"}
    (folder / "params.json").write_text(json.dumps(params_json(config) | {"quantization": scheme}))
    save_file(stored, folder / "consolidated.safetensors")
    return Written(folder, config, weights, inputs)


def deinterleave(weight: Tensor, heads: int) -> Tensor:
    """Row 2 i of a head to i, row 2 i + 1 to half of it further."""
    width = len(weight) // heads
    order = [head * width + 2 * (i % (width // 2)) + i // (width // 2) for head in range(heads) for i in range(width)]
    return weight[order]
