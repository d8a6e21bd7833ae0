"""Random checkpoints of any size, in the files that publishers ship, written in one pass with flat memory.

    bf16          config.json and sharded safetensors with their index, as mistralai/Mistral-Nemo-Instruct-2407
    fp8           the same with e4m3 projections, a scale and an input scale each, as RedHatAI's -FP8 of it
    gguf-q4_k_m   one file, Q4_K and Q6_K as llama.cpp's Q4_K_M mixes them

The weights come from one pool of random blocks, read from another random place for every tensor: what a decoder costs
does not depend on them, and a pool is written as fast as the disk takes it. The tokenizer is the real Tekken.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from engine.checkpoint.gguf import LAYER_NAMES
from engine.checkpoint.gguf_blocks import TYPES
from engine.checkpoint.layout import expected_tensors
from engine.config import ModelConfig
from service.text.bpe import byte_alphabet

FORMS = ("bf16", "fp8", "gguf-q4_k_m")

Bytes = npt.NDArray[np.uint8]

_POOL_BYTES = 2**25
_SHARD_BYTES = 5 * 10**9  # as Hugging Face's save_pretrained splits
_STD = 0.02  # of the weights: activations stay finite through any number of layers
_FP8_SCALE = 2.0**-11  # codes of standard deviation 41: most of e4m3's range is in use


def write_checkpoint(form: str, folder: Path, model: ModelConfig, tekken: Path, seed: int = 0) -> Path:
    """Write a checkpoint into a new folder; returns what to serve: the folder, or the .gguf file.

    Args:
        form: one of FORMS.
        tekken: a tekken.json whose vocabulary is the model's.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    if form == "gguf-q4_k_m":
        path = folder / "model-Q4_K_M.gguf"
        _write_gguf(path, model, tekken, rng)
        return path
    (folder / "tekken.json").write_bytes(tekken.read_bytes())
    _write_safetensors(folder, model, rng, fp8=form == "fp8")
    return folder


class _Noise:
    """Random blocks of one kind, as many as wanted. `make` returns uint8 [blocks, bytes of a block]."""

    def __init__(self, make: Callable[[int], Bytes], block: int, rng: np.random.Generator) -> None:
        self._pool = make(_POOL_BYTES // block)
        self._rng = rng

    def pieces(self, nbytes: int) -> Iterator[Bytes]:
        """nbytes bytes in pieces; whole blocks."""
        blocks = nbytes // self._pool.shape[1]
        while blocks:
            start = int(self._rng.integers(len(self._pool)))
            piece = self._pool[start : start + blocks]
            blocks -= len(piece)
            yield piece


def _bfloat16(values: npt.NDArray[np.float32]) -> Bytes:
    """Little-endian, cut off and not rounded: the values are random. uint8 [n, 2]."""
    return np.ascontiguousarray(values.view(np.uint8).reshape(-1, 4)[:, 2:])


def _noises(rng: np.random.Generator) -> dict[str, _Noise]:
    def bf16(count: int) -> Bytes:
        return _bfloat16(rng.normal(0, _STD, count).astype(np.float32))

    def norms(count: int) -> Bytes:
        return _bfloat16(rng.normal(1, _STD, count).astype(np.float32))

    def e4m3(count: int) -> Bytes:
        codes = rng.integers(0, 256, count, dtype=np.uint8)
        # Exponents of 5 and below 32 .. 64 in value: near normal, and far from 0x7f, which is no number.
        near: Bytes = (codes & np.uint8(0x80)) | (codes & np.uint8(0x7F)) % np.uint8(0x60)
        return near[:, None]

    def q4_k(count: int) -> Bytes:
        blocks = rng.integers(0, 256, (count, 144), dtype=np.uint8)  # d, dmin, 12 of scales, 128 of codes
        blocks[:, 0:4] = np.array([1.4e-4, 1.05e-3], np.float16).view(np.uint8)
        return blocks

    def q6_k(count: int) -> Bytes:
        blocks = rng.integers(0, 256, (count, 210), dtype=np.uint8)  # 128 low, 64 high, 16 scales, d
        blocks[:, 208:210] = np.array([1.5e-5], np.float16).view(np.uint8)
        return blocks

    return {
        "BF16": _Noise(bf16, 2, rng),
        "NORM": _Noise(norms, 2, rng),
        "F8_E4M3": _Noise(e4m3, 1, rng),
        "Q4_K": _Noise(q4_k, 144, rng),
        "Q6_K": _Noise(q6_k, 210, rng),
    }


# -- safetensors ------------------------------------------------------------------------------------------------------


def hf_config(model: ModelConfig) -> dict[str, Any]:
    """The config.json of a model whose weights are bfloat16."""
    return {
        "architectures": [model.architecture],
        "model_type": model.architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.intermediate_size,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        "max_position_embeddings": model.max_position_embeddings,
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": model.tie_word_embeddings,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": list(model.eos_token_ids),
        "torch_dtype": "bfloat16",
    }


def _write_safetensors(folder: Path, model: ModelConfig, rng: np.random.Generator, *, fp8: bool) -> None:
    config = hf_config(model)
    if fp8:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "activation_scheme": "static",
            "ignored_layers": ["lm_head"],
        }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    noises = _noises(rng)
    shards = _shards(_tensors(model, fp8))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, name)
        with (folder / name).open("wb") as file:
            _write_shard(file, shard, noises)
    total = sum(_tensor_bytes(*entry) for shard in shards for entry in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


_ITEM_BYTES = {"BF16": 2, "F8_E4M3": 1, "F32": 4}


def _tensors(model: ModelConfig, fp8: bool) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of everything in the file."""
    for name, shape in expected_tensors(model).items():
        if fp8 and "_proj." in name:
            yield name, "F8_E4M3", shape
            yield f"{name}_scale", "F32", (1,)
            yield f"{name.removesuffix('.weight')}.input_scale", "F32", (1,)
        else:
            yield name, "BF16", shape


def _tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * _ITEM_BYTES[dtype]


def _shards(tensors: Iterator[tuple[str, str, tuple[int, ...]]]) -> list[dict[str, tuple[str, tuple[int, ...]]]]:
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    size = 0
    for name, dtype, shape in tensors:
        nbytes = _tensor_bytes(dtype, shape)
        if size and size + nbytes > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = dtype, shape
        size += nbytes
    return shards


def _write_shard(
    file: BinaryIO, shard: Mapping[str, tuple[str, tuple[int, ...]]], noises: Mapping[str, _Noise]
) -> None:
    """Header length u64, header JSON, data. The library has no writer that streams.

    Source: huggingface/safetensors, README, "Format".
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in shard.items():
        start, end = end, end + _tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name, (dtype, shape) in shard.items():
        if dtype == "F32":
            file.write(struct.pack("<f", 0.05 if name.endswith("input_scale") else _FP8_SCALE))
            continue
        for piece in noises["NORM" if "norm" in name else dtype].pieces(_tensor_bytes(dtype, shape)):
            file.write(piece.data)


# -- GGUF -------------------------------------------------------------------------------------------------------------

_GGUF_NAMES = {ours: theirs for theirs, ours in LAYER_NAMES.items()}


def _write_gguf(path: Path, model: ModelConfig, tekken: Path, rng: np.random.Generator) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.num_kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    _add_tokenizer(writer, tekken)
    tensors = dict(_gguf_tensors(model))
    for name, (kind, shape) in tensors.items():
        is_float = kind is GGMLQuantizationType.F32
        stored = shape if is_float else (*shape[:-1], TYPES[kind].row_bytes(shape[-1]))
        dtype = np.dtype(np.float32 if is_float else np.uint8)
        writer.add_tensor_info(name, stored, dtype, TYPES[kind].row_bytes(math.prod(shape)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    noises = _noises(rng)
    with path.open("ab") as file:
        alignment = writer.data_alignment
        for kind, shape in tensors.values():
            file.write(b"\0" * (-file.tell() % alignment))
            if kind is GGMLQuantizationType.F32:
                file.write(np.float32(rng.normal(1, _STD, shape)).tobytes())
                continue
            for piece in noises[kind.name].pieces(TYPES[kind].row_bytes(math.prod(shape))):
                file.write(piece.data)


def _gguf_tensors(model: ModelConfig) -> Iterator[tuple[str, tuple[GGMLQuantizationType, tuple[int, ...]]]]:
    """Name, type and shape, with the types of Q4_K_M. Source: ggml-org/llama.cpp, `llama_tensor_get_type`."""
    fixed = {
        "model.embed_tokens": ("token_embd", GGMLQuantizationType.Q4_K),
        "lm_head": ("output", GGMLQuantizationType.Q6_K),
        "model.norm": ("output_norm", GGMLQuantizationType.F32),
    }
    for name, shape in expected_tensors(model).items():
        stem = name.removesuffix(".weight")
        if stem in fixed:
            theirs, kind = fixed[stem]
            yield f"{theirs}.weight", (kind, shape)
            continue
        _, _, layer, part = stem.split(".", 3)
        kind = GGMLQuantizationType.F32 if len(shape) == 1 else GGMLQuantizationType.Q4_K
        if part in ("self_attn.v_proj", "mlp.down_proj") and _more_bits(int(layer), model.num_layers):
            kind = GGMLQuantizationType.Q6_K
        yield f"blk.{layer}.{_GGUF_NAMES[part]}.weight", (kind, shape)


def _more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between. Source: llama.cpp, `use_more_bits`."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _add_tokenizer(writer: gguf.GGUFWriter, tekken: Path) -> None:
    """Tekken as llama.cpp's converter writes it: a GPT-2-style vocabulary, its merges worked out from the ranks."""
    data = json.loads(tekken.read_bytes())
    controls = data["config"]["default_num_special_tokens"]
    size = data["config"]["default_vocab_size"]
    tokens = [base64.b64decode(entry["token_bytes"]) for entry in data["vocab"][: size - controls]]
    alphabet = byte_alphabet()

    def spelled(token: bytes) -> str:
        return "".join(alphabet[value] for value in token)

    names = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{index}>" for index in range(3, controls))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("tekken")
    writer.add_token_list([*names, *map(spelled, tokens)])
    writer.add_token_types([gguf.TokenType.CONTROL] * controls + [gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges([" ".join(map(spelled, pair)) for pair in merges_of(tokens)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)


def merges_of(tokens: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """The pair that each token of more than one byte is made of: what merging by the ranks below its own leaves of it.

    Args:
        tokens: in rank order.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for rank, token in enumerate(tokens):
        parts = [bytes([value]) for value in token]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            at = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[at] >= rank:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]
