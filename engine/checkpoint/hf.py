"""Hugging Face checkpoints: config.json and safetensors, whole or sharded.

The keys of config.json are read here and not by transformers: its defaults change between versions (sliding_window,
where RoPE lives), and `null` must mean "none".
"""

from __future__ import annotations

from pathlib import Path

from engine.checkpoint.fields import Fields
from engine.checkpoint.fp8_config import hf_claims
from engine.checkpoint.weights import Dialect, SafetensorsCheckpoint, read_index
from engine.config import Llama3RopeScaling, ModelConfig
from engine.errors import UnsupportedModelError
from engine.model_files import HF_CONFIG, HF_INDEX, HF_WEIGHTS

VISION = ("Mistral3ForConditionalGeneration",)  # of these the text model is run, which text_config describes
ARCHITECTURES = ("MistralForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM", *VISION)
_VISION_PARTS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def open_hf(folder: Path, weights: Path | None = None) -> SafetensorsCheckpoint:
    """A folder with config.json and safetensors.

    Args:
        weights: the only safetensors file to use; None = those of the index, or model.safetensors of the folder.

    Raises:
        CheckpointError, UnsupportedModelError: name the file and what is wrong with it.
    """
    fields = Fields.of_json(folder / HF_CONFIG)
    config = _read_config(fields, folder)
    listed = None if weights else read_index(folder / HF_INDEX)
    files = [weights or folder / HF_WEIGHTS] if listed is None else sorted(set(listed.values()))
    dialect = Dialect(
        rename=_language_model if config.architecture in VISION else str,
        fp8=hf_claims(fields, folder),
        listed=listed,
    )
    return SafetensorsCheckpoint(weights or folder, files, config, dialect)


def _read_config(whole: Fields, folder: Path) -> ModelConfig:
    """What config.json and generation_config.json say, refused if this decoder does not implement it."""
    architecture = _architecture(whole)
    fields = _text_config(whole) if architecture in VISION else whole
    _refuse(fields)
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
    """The one architecture named."""
    names = fields.raw("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{fields.where}: architectures {names!r:.80}; supported are {', '.join(ARCHITECTURES)}"
        )
    return str(name)


def _text_config(fields: Fields) -> Fields:
    """The part of a model with images that is about text."""
    text = fields.child("text_config")
    if text is None:
        raise fields.wrong("text_config", None, "an object")
    if text.raw("model_type") not in (None, "mistral"):
        raise UnsupportedModelError(f"{text.where}: model_type {text.raw('model_type')!r:.60}; supported is 'mistral'")
    return text


def _refuse(fields: Fields) -> None:
    """Everything that would make it another model than this decoder is."""
    refusals: dict[str, tuple[object, ...]] = {
        "hidden_act": (None, "silu"),
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
        "num_local_experts": (None,),
    }
    for key, allowed in refusals.items():
        value = fields.raw(key)
        if value not in allowed:
            shown = " or ".join("absent" if each is None else repr(each) for each in allowed)
            raise UnsupportedModelError(f"{fields.where}: {key} {value!r:.60} is not supported; it must be {shown}")


def _rope(fields: Fields) -> tuple[float, Llama3RopeScaling | None]:
    """theta and scaling: `rope_parameters` since transformers 5, `rope_theta` and `rope_scaling` before."""
    rope = fields.child("rope_parameters") or fields.child("rope_scaling") or Fields(fields.where, {})
    theta = fields.number("rope_theta", rope.number("rope_theta", 10000.0))
    kind = rope.raw("rope_type") or rope.raw("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UnsupportedModelError(
            f"{rope.where}: rope_type {kind!r:.60} is not supported; it must be 'default' or 'llama3'"
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


def _language_model(name: str) -> str | None:
    """Our name of a tensor of a model with images: as the first files have it, or as transformers saves since 4.52."""
    for theirs, ours in (("model.language_model.", "model."), ("language_model.", "")):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return None if name.startswith(_VISION_PARTS) else name
