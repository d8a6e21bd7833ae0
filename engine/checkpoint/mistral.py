"""Mistral's own checkpoint form: params.json and consolidated.safetensors, with RoPE in interleaved pairs.

Source of names and permutation: mistralai/mistral-inference `args.py`, `rope.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.fields import Fields
from engine.checkpoint.hf import SafetensorsFiles
from engine.checkpoint.layout import check_tensors, rotate_half_order
from engine.config import ModelConfig
from engine.errors import UnsupportedModelError
from engine.quant.matrix import FloatMatrix, Matrix

PARAMS = "params.json"
WEIGHTS = "consolidated.safetensors"
_CONTEXT = 128000  # of NeMo; params.json rarely says
_EOS = 2  # `</s>` in every Mistral tokenizer; the file does not say
_BOS = 1
_FIXED_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


class MistralCheckpoint:
    """One open checkpoint. Names and shapes have been checked; reading yields rotate-half order."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError or UnsupportedModelError, naming the file and what is wrong with it."""
        self.config = read_params(folder)
        self._files = SafetensorsFiles([folder / WEIGHTS])
        self._stored_names = {_canonical(name): name for name in self._files.shapes}
        try:
            shapes = {name: self._files.shapes[stored] for name, stored in self._stored_names.items()}
            check_tensors(str(folder / WEIGHTS), shapes, self.config)
        except BaseException:
            self._files.close()
            raise
        self.num_parameters = sum(torch.Size(shape).numel() for shape in shapes.values())

    def read(self, name: str) -> Tensor:
        values = self._files.read(self._stored_names[name])
        if ".self_attn.q_proj." in name:
            return rotate_half_order(values, self.config.num_heads, self.config.head_dim)
        if ".self_attn.k_proj." in name:
            return rotate_half_order(values, self.config.num_kv_heads, self.config.head_dim)
        return values

    def matrix(self, name: str, start: int = 0, stop: int | None = None) -> Matrix:
        return FloatMatrix(self.read(name)[start:stop])

    def stored_bytes(self, name: str) -> int:
        return self._files.nbytes[self._stored_names[name]]

    def close(self) -> None:
        self._files.close()


def read_params(folder: Path) -> ModelConfig:
    """What params.json says, refused if this decoder does not implement it."""
    fields = Fields.of_json(folder / PARAMS)
    for key in ("moe", "quantization", "vision_encoder", "yarn", "lora"):
        if fields.raw(key):
            raise UnsupportedModelError(f"{fields.where}: {key} is not supported")
    heads = fields.size("n_heads")
    kv_heads = fields.size("n_kv_heads", heads)
    if heads % kv_heads:
        raise fields.wrong("n_heads", heads, f"a multiple of n_kv_heads ({kv_heads})")
    hidden = fields.size("dim")
    window = fields.optional_size("sliding_window") or fields.optional_size("_sliding_window")
    return ModelConfig(
        architecture="MistralForCausalLM",
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.size("n_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=fields.size("head_dim", max(1, hidden // heads)),
        intermediate_size=fields.size("hidden_dim"),
        rms_norm_eps=fields.number("norm_eps"),
        rope_theta=fields.number("rope_theta", 1e6),
        max_position_embeddings=fields.size("max_position_embeddings", fields.size("max_seq_len", _CONTEXT)),
        sliding_window=window,
        tie_word_embeddings=fields.flag("tied_embeddings", False),
        bos_token_id=_BOS,
        eos_token_ids=(_EOS,),
    )


def _canonical(name: str) -> str:
    """Hugging Face's name of a tensor; unknown names stay, and are refused where all names are checked."""
    if name in _FIXED_NAMES:
        return _FIXED_NAMES[name]
    match name.removesuffix(".weight").split(".", 2):
        case ["layers", index, part] if part in _LAYER_NAMES and index.isdecimal():
            return f"model.layers.{int(index)}.{_LAYER_NAMES[part]}.weight"
    return name
