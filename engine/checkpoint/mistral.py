"""Mistral's own checkpoint form: params.json and consolidated.safetensors, with RoPE in interleaved pairs.

Source of names and permutation: mistralai/mistral-inference `args.py`, `rope.py`; of FP8 and of images, vLLM
`models/llama.py:mistral_mapping`, `transformers_utils/configs/mistral.py`.
"""

from __future__ import annotations

from pathlib import Path

from engine.checkpoint.fields import Fields
from engine.checkpoint.fp8_config import mistral_claims
from engine.checkpoint.weights import Dialect, SafetensorsCheckpoint, read_index
from engine.config import ModelConfig
from engine.errors import UnsupportedModelError
from engine.model_files import MISTRAL_CONFIG, MISTRAL_INDEX, MISTRAL_WEIGHTS

_CONTEXT = 128000  # of NeMo; params.json rarely says
_EOS = 2  # `</s>` in every Mistral tokenizer; the file does not say
_BOS = 1
_VISION = ("vision_encoder", "multimodal")  # keys of params.json, the second of newer files
_VISION_PARTS = ("vision_encoder.", "vision_language_adapter.", "patch_merger.", "pre_mm_projector_norm.")
_KINDS = {"qscale_weight": "weight_scale", "qscale_act": "input_scale"}
_FIXED_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
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
_KV_QUANTIZERS = {f"attention.{each}_fake_quantizer": f"self_attn.{each}_scale" for each in ("q", "k", "v", "kv")}


def open_mistral(folder: Path) -> SafetensorsCheckpoint:
    """A folder with params.json and consolidated.safetensors, whole or sharded.

    Raises:
        CheckpointError, UnsupportedModelError: name the file and what is wrong with it.
    """
    fields = Fields.of_json(folder / MISTRAL_CONFIG)
    config = _read_params(fields)
    listed = read_index(folder / MISTRAL_INDEX)
    files = [folder / MISTRAL_WEIGHTS] if listed is None else sorted(set(listed.values()))
    images = any(fields.raw(key) for key in _VISION)
    dialect = Dialect(
        rename=lambda name: _canonical(name, images), interleaved=True, fp8=mistral_claims(fields), listed=listed
    )
    return SafetensorsCheckpoint(folder / MISTRAL_WEIGHTS, files, config, dialect)


def _read_params(fields: Fields) -> ModelConfig:
    """What params.json says, refused if this decoder does not implement it."""
    for key in ("moe", "yarn", "lora", "llama_4_scaling", "qk_nope_head_dim"):
        if fields.raw(key):
            raise UnsupportedModelError(f"{fields.where}: {key} is not supported")
    for key, only in {"model_type": "transformer", "activation": "silu"}.items():
        if fields.raw(key) not in (None, only):
            raise UnsupportedModelError(
                f"{fields.where}: {key} {fields.raw(key)!r:.60} is not supported; it must be {only!r}"
            )
    heads = fields.size("n_heads")
    kv_heads = fields.size("n_kv_heads", heads)
    if heads % kv_heads:
        raise fields.wrong("n_heads", heads, f"a multiple of n_kv_heads ({kv_heads})")
    hidden = fields.size("dim")
    head_dim = fields.size("head_dim", max(1, hidden // heads))
    if head_dim % 2:
        raise fields.wrong("head_dim", head_dim, "even, for rotary embeddings")
    window = fields.optional_size("sliding_window") or fields.optional_size("_sliding_window")
    return ModelConfig(
        architecture="MistralForCausalLM",
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.size("n_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.size("hidden_dim"),
        rms_norm_eps=fields.number("norm_eps"),
        rope_theta=fields.number("rope_theta", 1e6 if window is None else 1e4),  # 7B v0.1 does not say
        max_position_embeddings=fields.size("max_position_embeddings", fields.size("max_seq_len", _CONTEXT)),
        sliding_window=window,
        tie_word_embeddings=fields.flag("tied_embeddings", False),
        bos_token_id=_BOS,
        eos_token_ids=(_EOS,),
    )


def _canonical(name: str, images: bool) -> str | None:
    """Our name of a tensor; unknown names stay, and are refused where all names are checked.

    Args:
        images: there are parts for images, which are left out.
    """
    if images and name.startswith(_VISION_PARTS):
        return None
    module, _, kind = name.rpartition(".")
    kind = _KINDS.get(kind, kind)
    if module in _FIXED_NAMES:
        return f"{_FIXED_NAMES[module]}.{kind}"
    match module.split(".", 2):
        case ["layers", index, part] if part in _LAYER_NAMES:
            return f"model.layers.{index}.{_LAYER_NAMES[part]}.{kind}"
        case ["layers", index, part] if part in _KV_QUANTIZERS and kind == "input_scale":
            return f"model.layers.{index}.{_KV_QUANTIZERS[part]}"
    return name
