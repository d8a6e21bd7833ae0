"""GGUF checkpoints: metadata to ModelConfig, tensors dequantised one at a time from the memory-mapped file.

llama.cpp stores query and key projections of its `llama` architecture in interleaved-RoPE order; they are put back into
rotate-half order here. Its `qwen2` architecture keeps the order. Dequantisation is that of the `gguf` package.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from engine.checkpoint.fields import Fields
from engine.checkpoint.layout import check_tensors, rotate_half_order
from engine.config import ModelConfig
from engine.errors import CheckpointError, UnsupportedModelError
from engine.gguf_header import GGUFHeader, GGUFTensor, read_header
from engine.quant.matrix import FloatMatrix, Matrix

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q5_K", "Q6_K")
_SUPPORTED = {GGMLQuantizationType[name] for name in TYPES}
_FIXED_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFCheckpoint:
    """One open file. Names, shapes, types and extents have been checked; reading dequantises to float."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError or UnsupportedModelError, naming the file and what is wrong with it."""
        header = read_header(path, lambda key: not key.startswith("tokenizer.ggml.") or key.endswith("_token_id"))
        self._path = path
        self._directory = {_canonical(name): tensor for name, tensor in header.tensors.items()}
        for name, tensor in header.tensors.items():
            _check_extent(path, name, tensor, header.file_size)
        self._data = np.memmap(path, mode="r", dtype=np.uint8)
        self.config = _read_config(path, header, self._rope_factors())
        check_tensors(str(path), {name: tensor.shape for name, tensor in self._directory.items()}, self.config)
        self.num_parameters = sum(math.prod(tensor.shape) for tensor in self._directory.values())
        self._interleaved = header.metadata["general.architecture"] == "llama"

    def read(self, name: str) -> Tensor:
        tensor = self._directory.get(name)
        if tensor is None:
            raise CheckpointError(f"{self._path}: tensor {name} is missing")
        values = self._dequantise(tensor)
        if self._interleaved and ".self_attn.q_proj." in name:
            return rotate_half_order(values, self.config.num_heads, self.config.head_dim)
        if self._interleaved and ".self_attn.k_proj." in name:
            return rotate_half_order(values, self.config.num_kv_heads, self.config.head_dim)
        return values

    def matrix(self, name: str, start: int = 0, stop: int | None = None) -> Matrix:
        return FloatMatrix(self.read(name)[start:stop])

    def stored_bytes(self, name: str) -> int:
        return _num_bytes(self._directory[name])

    def close(self) -> None:
        del self._data

    def _dequantise(self, tensor: GGUFTensor) -> Tensor:
        kind = GGMLQuantizationType(tensor.ggml_type)
        raw = self._data[tensor.offset : tensor.offset + _num_bytes(tensor)]
        if kind is GGMLQuantizationType.BF16:
            return torch.from_numpy(raw.copy()).view(torch.bfloat16).view(tensor.shape)
        rows = raw.reshape(*tensor.shape[:-1], -1)
        return torch.from_numpy(np.array(dequantize(rows, kind), dtype=np.float32)).view(tensor.shape)

    def _rope_factors(self) -> tuple[float, ...] | None:
        tensor = self._directory.get("rope_freqs.weight")
        return None if tensor is None else tuple(self._dequantise(tensor).flatten().tolist())


def _canonical(name: str) -> str:
    """Hugging Face's name of a GGUF tensor; unknown names stay, and are refused where all names are checked."""
    if name in _FIXED_NAMES:
        return _FIXED_NAMES[name]
    match name.split("."):
        case ["blk", index, part, kind] if part in _LAYER_NAMES and index.isdecimal():
            return f"model.layers.{int(index)}.{_LAYER_NAMES[part]}.{kind}"
    return name


def _num_bytes(tensor: GGUFTensor) -> int:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.ggml_type)]
    return math.prod(tensor.shape) // block * size


def _check_extent(path: Path, name: str, tensor: GGUFTensor, file_size: int) -> None:
    """The type is one that we read, rows are whole blocks, and the data lies inside the file."""
    known = {kind.value: kind for kind in GGMLQuantizationType}
    kind = known.get(tensor.ggml_type)
    if kind not in _SUPPORTED:
        shown = kind.name if kind else tensor.ggml_type
        raise UnsupportedModelError(f"{path}: tensor {name} has type {shown}; supported are {', '.join(TYPES)}")
    block, _ = GGML_QUANT_SIZES[kind]
    if tensor.shape[-1] % block:
        raise CheckpointError(
            f"{path}: tensor {name} has rows of {tensor.shape[-1]}, not whole {kind.name} blocks of {block}"
        )
    end = tensor.offset + _num_bytes(tensor)
    if end > file_size:
        raise CheckpointError(f"{path}: truncated: tensor {name} ends at byte {end}, the file at {file_size}")


def _read_config(path: Path, header: GGUFHeader, rope_factors: tuple[float, ...] | None) -> ModelConfig:
    metadata = header.metadata
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{path}: general.architecture {arch!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    fields = Fields(f"{path}: {arch}", {key.removeprefix(f"{arch}."): value for key, value in metadata.items()})
    _refuse(fields)
    heads = fields.size("attention.head_count")
    kv_heads = fields.size("attention.head_count_kv", heads)
    hidden = fields.size("embedding_length")
    if heads % kv_heads:
        raise fields.wrong("attention.head_count", heads, f"a multiple of attention.head_count_kv ({kv_heads})")
    head_dim = fields.size("attention.key_length", max(1, hidden // heads))
    rotated = fields.size("rope.dimension_count", head_dim)
    if head_dim % 2 or rotated != head_dim:
        raise fields.wrong("rope.dimension_count", rotated, f"the head width ({head_dim}), and even")
    if rope_factors is not None and len(rope_factors) != head_dim // 2:
        raise CheckpointError(f"{path}: rope_freqs.weight has {len(rope_factors)} values, expected {head_dim // 2}")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{path}: tensor token_embd.weight is missing")
    return ModelConfig(
        architecture=ARCHITECTURES[arch],
        vocab_size=embedding.shape[0],
        hidden_size=hidden,
        num_layers=fields.size("block_count"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.size("feed_forward_length"),
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        rope_theta=fields.number("rope.freq_base", 10000.0),
        rope_freq_factors=rope_factors,
        max_position_embeddings=fields.size("context_length"),
        sliding_window=fields.raw("attention.sliding_window") and fields.size("attention.sliding_window"),
        qkv_bias="blk.0.attn_q.bias" in header.tensors,
        tie_word_embeddings="output.weight" not in header.tensors,
        bos_token_id=_token_id(metadata, "bos"),
        eos_token_ids=tuple(
            dict.fromkeys(token for kind in ("eos", "eot", "eom") if (token := _token_id(metadata, kind)) is not None)
        ),
    )


def _refuse(fields: Fields) -> None:
    """What llama.cpp's `llama` architecture also covers and this decoder does not."""
    refusals: dict[str, tuple[object, ...]] = {
        "expert_count": (None, 0),
        "rope.scaling.type": (None, "none"),
        "attention.value_length": (None, fields.raw("attention.key_length")),
    }
    for key, allowed in refusals.items():
        if (value := fields.raw(key)) not in allowed:
            raise UnsupportedModelError(f"{fields.where}.{key} {value!r} is not supported")


def _token_id(metadata: dict[str, Any], kind: str) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{kind}_token_id")
    return value if isinstance(value, int) and not isinstance(value, bool) else None
