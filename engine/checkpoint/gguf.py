"""GGUF checkpoints: metadata to ModelConfig, matrices as the file stores them, read from it a few rows at a time.

llama.cpp stores query and key projections of its `llama` architecture in interleaved-RoPE order; they are put back into
rotate-half order here, by moving rows of blocks. Its `qwen2` architecture keeps the order.

Rows are read and the file is not mapped, as in `files`.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.fields import Fields
from engine.checkpoint.files import read_into
from engine.checkpoint.gguf_blocks import OTHER_NAMES, TYPES
from engine.checkpoint.layout import check_tensors, rotate_half_rows
from engine.config import ModelConfig
from engine.errors import CheckpointError, UnsupportedModelError
from engine.gguf_header import GGUFHeader, GGUFTensor, read_header
from engine.quant.matrix import FloatMatrix, GroupMatrix, Matrix

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_SCALES = torch.float16  # what scales and minima are kept in, so that none may be larger
FIXED_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
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
    """One open file. Names, shapes, types and extents have been checked; values are as they are read."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError or UnsupportedModelError, naming the file and what is wrong with it."""
        header = read_header(path, lambda key: not key.startswith("tokenizer.ggml.") or key.endswith("_token_id"))
        files = header.metadata.get("split.count")
        if isinstance(files, int) and files > 1:
            raise UnsupportedModelError(f"{path}: one of {files} files; join them with llama-gguf-split --merge")
        self._path = path
        self._directory = {_canonical(name): tensor for name, tensor in header.tensors.items()}
        if len(self._directory) != len(header.tensors):
            raise CheckpointError(f"{path}: two names of tensors mean the same one")
        for name, tensor in header.tensors.items():
            _check_extent(path, name, tensor, header.file_size)
        self._interleaved = header.metadata.get("general.architecture") == "llama"
        self._file = path.open("rb")
        try:
            self.config = _read_config(path, header, self._rope_factors())
            check_tensors(str(path), {name: tensor.shape for name, tensor in self._directory.items()}, self.config)
        except BaseException:
            self.close()
            raise
        self.num_parameters = sum(math.prod(tensor.shape) for tensor in self._directory.values())

    def read(self, name: str) -> Tensor:
        matrix = self.matrix(name)
        values = matrix.values if isinstance(matrix, FloatMatrix) else matrix.dequantise()
        return values.view(self._directory[name].shape)

    def matrix(self, name: str, start: int = 0, stop: int | None = None) -> Matrix:
        tensor = self._directory.get(name)
        if tensor is None:
            raise CheckpointError(f"{self._path}: tensor {name} is missing")
        rows = range(tensor.shape[0])[start:stop]
        read = partial(self._read_rows, name, tensor)
        if self._moves_rows(name):
            raw = rotate_half_rows(read, rows.start, rows.stop, self.config.head_dim)
        else:
            raw = read(rows.start, rows.stop)
        matrix = TYPES[tensor.ggml_type].matrix(raw)
        _check_finite(f"{self._path}: tensor {name}", matrix)
        return matrix

    def stored_bytes(self, name: str) -> int:
        return _num_bytes(self._directory[name])

    def close(self) -> None:
        self._file.close()

    def _moves_rows(self, name: str) -> bool:
        return self._interleaved and (".self_attn.q_proj." in name or ".self_attn.k_proj." in name)

    def _read_rows(self, name: str, tensor: GGUFTensor, start: int, stop: int) -> Tensor:
        """uint8 [rows, bytes of a row]. Of a vector, each number is a row."""
        size = TYPES[tensor.ggml_type].row_bytes(math.prod(tensor.shape[1:]))
        raw = torch.empty(stop - start, size, dtype=torch.uint8)
        read_into(raw.view(-1), name, self._path, self._file.fileno(), tensor.offset + start * size)
        return raw

    def _rope_factors(self) -> tuple[float, ...] | None:
        name = "rope_freqs.weight"
        return tuple(self.read(name).flatten().tolist()) if name in self._directory else None


def _canonical(name: str) -> str:
    """Hugging Face's name of a GGUF tensor; unknown names stay, and are refused where all names are checked."""
    if name in FIXED_NAMES:
        return FIXED_NAMES[name]
    match name.split("."):
        case ["blk", index, part, kind] if part in LAYER_NAMES and index.isdecimal():
            return f"model.layers.{int(index)}.{LAYER_NAMES[part]}.{kind}"
    return name


def _num_bytes(tensor: GGUFTensor) -> int:
    return TYPES[tensor.ggml_type].row_bytes(math.prod(tensor.shape))


def _check_extent(path: Path, name: str, tensor: GGUFTensor, file_size: int) -> None:
    """The type is one that we read, rows are whole blocks, and the data lies inside the file."""
    kind = TYPES.get(tensor.ggml_type)
    if kind is None:
        shown = OTHER_NAMES.get(tensor.ggml_type, tensor.ggml_type)
        supported = ", ".join(each.name for each in TYPES.values())
        raise UnsupportedModelError(f"{path}: tensor {name} has type {shown}; supported are {supported}")
    if tensor.shape[-1] % kind.weights:
        raise CheckpointError(
            f"{path}: tensor {name} has rows of {tensor.shape[-1]}, not whole {kind.name} blocks of {kind.weights}"
        )
    if len(tensor.shape) == 1 and kind.floats is None:
        raise CheckpointError(f"{path}: tensor {name} is a vector in {kind.name}; vectors must be F32, F16 or BF16")
    end = tensor.offset + _num_bytes(tensor)
    if end > file_size:
        raise CheckpointError(f"{path}: truncated: tensor {name} ends at byte {end}, the file at {file_size}")


def _check_finite(where: str, matrix: Matrix) -> None:
    """Every weight is a number if all scales and minima are; only these are looked at, which costs next to nothing."""
    if isinstance(matrix, FloatMatrix):
        numbers, what, dtype = [matrix.values], "a weight", matrix.values.dtype
    else:
        assert isinstance(matrix, GroupMatrix)
        numbers, what, dtype = [matrix.scales, matrix.mins], "a scale or minimum", _SCALES
    most = torch.finfo(dtype).max
    for low, high in (each.aminmax() for each in numbers if each.numel()):
        if not -most <= low <= high <= most:  # NaN is in no order
            span = f"between {low:g} and {high:g}"
            raise CheckpointError(f"{where} has {what} {span}; it must be finite, and at most {most:g}")


def _read_config(path: Path, header: GGUFHeader, rope_factors: tuple[float, ...] | None) -> ModelConfig:
    metadata = header.metadata
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{path}: general.architecture {arch!r:.60} is not supported; supported are {', '.join(ARCHITECTURES)}"
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
    if rope_factors is not None and min(rope_factors) <= 0:
        raise CheckpointError(f"{path}: rope_freqs.weight has {min(rope_factors):g}; it must be positive")
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
        sliding_window=fields.size("attention.sliding_window") if fields.raw("attention.sliding_window") else None,
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
            raise UnsupportedModelError(f"{fields.where}.{key} {value!r:.60} is not supported")


def _token_id(metadata: dict[str, Any], kind: str) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{kind}_token_id")
    return value if isinstance(value, int) and not isinstance(value, bool) else None
