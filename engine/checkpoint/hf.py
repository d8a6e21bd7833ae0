"""Hugging Face checkpoints: config.json and safetensors, whole or sharded, memory-mapped and read tensor by tensor.

The keys of config.json are read here and not by transformers: its defaults change between versions (sliding_window,
where RoPE lives), and `null` must mean "none".
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.checkpoint.fields import Fields
from engine.checkpoint.layout import FLOAT_TYPES, check_tensors
from engine.config import Llama3RopeScaling, ModelConfig
from engine.errors import CheckpointError, UnsupportedModelError
from engine.quant.matrix import FloatMatrix, Matrix

ARCHITECTURES = ("MistralForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class SafetensorsFiles:
    """Several safetensors files seen as one mapping of names; each is opened once and stays memory-mapped."""

    def __init__(self, files: list[Path]) -> None:
        """Raises CheckpointError for a file that is missing, truncated or corrupt, and for a name that stands twice."""
        self._stack = ExitStack()
        self._home: dict[str, tuple[Any, Path]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.nbytes: dict[str, int] = {}
        try:
            for path in files:
                self._open(path)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        try:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                if name in self._home:
                    raise CheckpointError(f"{path}: tensor {name} is also in {self._home[name][1].name}")
                part = file.get_slice(name)
                if part.get_dtype() not in FLOAT_TYPES:
                    supported = ", ".join(FLOAT_TYPES)
                    raise UnsupportedModelError(
                        f"{path}: tensor {name} has dtype {part.get_dtype()}; supported are {supported}"
                    )
                self._home[name] = (file, path)
                self.shapes[name] = tuple(part.get_shape())
                self.nbytes[name] = math.prod(self.shapes[name]) * FLOAT_TYPES[part.get_dtype()].itemsize
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from None

    def home(self, name: str) -> Path:
        return self._home[name][1]

    def read(self, name: str) -> Tensor:
        file, path = self._home[name]
        try:
            tensor: Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: tensor {name} cannot be read: {error}") from None
        return tensor

    def close(self) -> None:
        self._stack.close()


class HFCheckpoint:
    """One open checkpoint. Names and shapes have been checked; reading yields what the file stores."""

    def __init__(self, folder: Path, weights: Path | None = None) -> None:
        """
        Args:
            folder: where config.json is.
            weights: the only safetensors file to use; None = the index or model.safetensors of the folder.

        Raises:
            CheckpointError, UnsupportedModelError: name the file and what is wrong with it.
        """
        self.config = read_config(folder)
        self._files = SafetensorsFiles([weights] if weights else _weight_files(folder))
        try:
            check_tensors(str(weights or folder), self._files.shapes, self.config)
        except BaseException:
            self._files.close()
            raise
        self.num_parameters = sum(torch.Size(shape).numel() for shape in self._files.shapes.values())

    def read(self, name: str) -> Tensor:
        return self._files.read(name)

    def matrix(self, name: str, start: int = 0, stop: int | None = None) -> Matrix:
        return FloatMatrix(self.read(name)[start:stop])

    def stored_bytes(self, name: str) -> int:
        return self._files.nbytes[name]

    def close(self) -> None:
        self._files.close()


def read_config(folder: Path) -> ModelConfig:
    """What config.json and generation_config.json say, refused if this decoder does not implement it."""
    fields = Fields.of_json(folder / "config.json")
    architecture = _architecture(fields)
    heads = fields.size("num_attention_heads")
    kv_heads = fields.size("num_key_value_heads", heads)
    hidden = fields.size("hidden_size")
    if heads % kv_heads:
        raise fields.wrong("num_attention_heads", heads, f"a multiple of num_key_value_heads ({kv_heads})")
    if fields.raw("head_dim") is None and hidden % heads:
        raise fields.wrong(
            "hidden_size", hidden, f"a multiple of num_attention_heads ({heads}) where head_dim is absent"
        )
    head_dim = fields.size("head_dim", hidden // heads)
    if head_dim % 2:
        raise fields.wrong("head_dim", head_dim, "even, for rotary embeddings")
    theta, scaling = _rope(fields)
    qwen = architecture == "Qwen2ForCausalLM"
    window = fields.optional_size("sliding_window") if fields.flag("use_sliding_window", not qwen) else None
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.size("intermediate_size"),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=fields.size("max_position_embeddings"),
        sliding_window=window,
        qkv_bias=qwen,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        eos_token_ids=_eos(fields, folder),
    )


def _architecture(fields: Fields) -> str:
    """The one architecture named, after everything that would make it another model has been refused."""
    names = fields.raw("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{fields.where}: architectures {names!r}; supported are {', '.join(ARCHITECTURES)}"
        )
    refusals: dict[str, tuple[object, ...]] = {
        "quantization_config": (None,),
        "hidden_act": (None, "silu"),
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
        "num_local_experts": (None,),
    }
    for key, allowed in refusals.items():
        value = fields.raw(key)
        if value not in allowed:
            shown = " or ".join("absent" if each is None else repr(each) for each in allowed)
            raise UnsupportedModelError(f"{fields.where}: {key} {value!r} is not supported; it must be {shown}")
    return str(name)


def _rope(fields: Fields) -> tuple[float, Llama3RopeScaling | None]:
    """theta and scaling: `rope_parameters` since transformers 5, `rope_theta` and `rope_scaling` before."""
    rope = fields.child("rope_parameters") or fields.child("rope_scaling") or Fields(fields.where, {})
    theta = fields.number("rope_theta", rope.number("rope_theta", 10000.0))
    kind = rope.raw("rope_type") or rope.raw("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UnsupportedModelError(
            f"{rope.where}: rope_type {kind!r} is not supported; it must be 'default' or 'llama3'"
        )
    return theta, Llama3RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.size("original_max_position_embeddings"),
    )


def _eos(fields: Fields, folder: Path) -> tuple[int, ...]:
    """Ids of both files: generation_config.json often knows more of them (`<|eot_id|>`)."""
    ids = fields.token_ids("eos_token_id")
    generation = folder / "generation_config.json"
    if generation.exists():
        ids += Fields.of_json(generation).token_ids("eos_token_id")
    return tuple(dict.fromkeys(ids))


def _weight_files(folder: Path) -> list[Path]:
    """The shards that the index names, or the single file."""
    index = folder / INDEX
    if not index.exists():
        return [folder / SINGLE]
    weight_map = Fields.of_json(index).raw("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is not an object of tensor names and files")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise CheckpointError(f"{index}: weight_map names {name!r}, which is not a file of this folder")
    return [folder / name for name in names]
