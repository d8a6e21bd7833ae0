"""Every published relative loads as it is, and a whole engine over it says what transformers says of the same files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from engine.checkpoint import open_checkpoint
from engine.errors import CheckpointError, UnsupportedModelError
from tests.engine.oracle import engine_logprobs, from_transformers
from tests.fp8_models import write_fp8
from tests.published_models import (
    MODELS,
    SMALL_31,
    SMALL_31_TEXT,
    VISION,
    shape_of,
    weights_of,
    write_mistral,
    write_published,
    write_shards,
)

PROMPT = torch.randint(11, 160, (48,), generator=torch.Generator().manual_seed(5)).tolist()
BOUND = 5e-4  # of logarithms of probabilities, in float32 on both sides


@torch.inference_mode()
def logprobs(model: transformers.PreTrainedModel) -> Tensor:
    return model(input_ids=torch.tensor([PROMPT])).logits[0, :-1].log_softmax(-1)


def read_by_transformers(folder: Path, kind: type = transformers.AutoModelForCausalLM) -> transformers.PreTrainedModel:
    """From the same files."""
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def assert_same(found: Tensor, expected: Tensor) -> None:
    uniform = -math.log(expected.shape[-1])
    assert expected.amax(-1).mean() > uniform + 1.5  # so that every part of the model matters
    assert (found - expected).abs().max() < BOUND


@pytest.mark.parametrize("name", MODELS)
def test_published_models_say_what_transformers_says(tmp_path: Path, name: str) -> None:
    folder = write_published(tmp_path, name, seed=21)
    assert_same(engine_logprobs(folder, PROMPT), logprobs(read_by_transformers(folder)))


@pytest.mark.parametrize("name", [name for name in MODELS if "istral" in name])
@pytest.mark.parametrize("shards", [1, 3])
def test_mistrals_own_form_says_the_same(tmp_path: Path, name: str, shards: int) -> None:
    config = MODELS[name].config
    weights = weights_of(config, seed=22)
    params: dict[str, Any] = {"max_seq_len": ...}
    if config["sliding_window"]:
        params |= {"rope_theta": ..., "sliding_window": config["sliding_window"]}  # as 7B v0.1 has it
    folder = write_mistral(tmp_path, config, weights, shards, **params)
    expected = from_transformers(shape_of(config), {name: weight.float() for name, weight in weights.items()})
    assert_same(engine_logprobs(folder, PROMPT), logprobs(expected))


# -- Mistral Small 3.1 and 3.2: the text model among parts for images ------------------------------------------------


def images(seed: int = 0) -> dict[str, Tensor]:
    """The tensors of the other parts, under the names that transformers saves."""
    torch.manual_seed(seed)
    model = transformers.Mistral3ForConditionalGeneration(transformers.AutoConfig.for_model(**SMALL_31))
    return {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if "vision_tower" in name or "multi_modal_projector" in name
    }


def old_name(name: str) -> str:
    """As the first files of Mistral Small 3.1 have it."""
    if "vision_tower" in name or "multi_modal_projector" in name:
        return name.removeprefix("model.")
    return f"language_model.{name}"


def new_name(name: str) -> str:
    """As transformers saves since 4.52."""
    if name.startswith("model.") and "vision_tower" not in name and "multi_modal_projector" not in name:
        return "model.language_model." + name.removeprefix("model.")
    return name


@pytest.mark.parametrize("rename", [old_name, new_name])
def test_the_text_of_mistral_small_is_that_of_transformers(tmp_path: Path, rename: Any) -> None:
    tensors = weights_of(SMALL_31_TEXT, seed=23) | images()
    write_shards(tmp_path, {rename(name): tensor for name, tensor in tensors.items()}, shards=10)
    (tmp_path / "config.json").write_text(json.dumps(SMALL_31))
    (tmp_path / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    expected = read_by_transformers(tmp_path, transformers.Mistral3ForConditionalGeneration)
    assert_same(engine_logprobs(tmp_path, PROMPT), logprobs(expected))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config.eos_token_ids == (2,)
        assert checkpoint.num_parameters == sum(tensor.numel() for tensor in weights_of(SMALL_31_TEXT).values())


@pytest.mark.parametrize("key", ["vision_encoder", "multimodal"])
def test_mistral_small_in_mistrals_own_form(tmp_path: Path, key: str) -> None:
    weights = weights_of(SMALL_31_TEXT, seed=24)
    parts = {
        "vision_encoder.transformer.layers.0.attention.wq.weight": torch.ones(4, 4, dtype=torch.bfloat16),
        "vision_encoder.ln_pre.weight": torch.ones(4, dtype=torch.bfloat16),
        "vision_language_adapter.w_in.weight": torch.ones(4, 4, dtype=torch.bfloat16),
        "patch_merger.merging_layer.weight": torch.ones(4, 16, dtype=torch.bfloat16),
        "pre_mm_projector_norm.weight": torch.ones(4, dtype=torch.bfloat16),
    }
    encoder = {"hidden_size": 4, "image_token_id": 10, "mm_projector_id": "patch_merge", "spatial_merge_size": 2}
    folder = write_mistral(
        tmp_path,
        SMALL_31_TEXT,
        weights,
        **{key: encoder if key == "vision_encoder" else {"vision_encoder_args": encoder}},
    )
    file = folder / "consolidated.safetensors"
    write_shards(folder, load_file(file) | parts, 1, "consolidated")
    expected = from_transformers(shape_of(SMALL_31_TEXT), {name: weight.float() for name, weight in weights.items()})
    assert_same(engine_logprobs(folder, PROMPT), logprobs(expected))


def test_mistral_small_in_fp8_leaves_images_and_head_out(tmp_path: Path) -> None:
    """As RedHatAI/Mistral-Small-3.1-24B-Instruct-2503-FP8-dynamic: patterns, under the names of the file."""
    written = write_fp8(tmp_path / "text", "compressed-dynamic", seed=25)
    tensors = load_file(written.folder / "model.safetensors") | images()
    write_shards(tmp_path, {old_name(name): tensor for name, tensor in tensors.items()}, shards=4)
    config = json.loads((written.folder / "config.json").read_text())
    quantisation = config.pop("compression_config")
    quantisation["ignore"] = ["re:.*lm_head", "re:vision_tower.*", "re:multi_modal_projector.*"]
    text = {key: value for key, value in config.items() if key != "architectures"}
    (tmp_path / "config.json").write_text(
        json.dumps(SMALL_31 | {"text_config": text, "quantization_config": quantisation, "vision_config": VISION})
    )
    expected = from_transformers(written.config, written.weights)
    assert (engine_logprobs(tmp_path, PROMPT, "fp8-weight-only") - logprobs(expected)).abs().max() < BOUND


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"text_config": ...}, "text_config is missing"),
        ({"text_config": SMALL_31_TEXT | {"model_type": "ministral3"}}, "model_type 'ministral3'"),
        ({"text_config": SMALL_31_TEXT | {"rope_parameters": {"rope_type": "yarn"}}}, "rope_type 'yarn'"),
        ({"architectures": ["PixtralForConditionalGeneration"]}, "architectures"),
        ({"architectures": ["MistralForCausalLM"]}, "num_attention_heads is missing"),
    ],
)
def test_other_models_with_images_are_refused(tmp_path: Path, changes: dict[str, Any], names: str) -> None:
    write_shards(tmp_path, {old_name(name): tensor for name, tensor in weights_of(SMALL_31_TEXT).items()}, 1)
    config = {key: value for key, value in (SMALL_31 | changes).items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=names), open_checkpoint(tmp_path):
        pass


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("moe", {"num_experts": 8}),
        ("yarn", {"factor": 16}),
        ("llama_4_scaling", {"beta": 0.1}),
        ("model_type", "mamba"),
        ("sliding_window", [None, 32768]),
    ],
)
def test_what_mistrals_own_form_can_say_and_this_decoder_is_not_is_refused(
    tmp_path: Path, key: str, value: object
) -> None:
    folder = write_mistral(tmp_path, SMALL_31_TEXT, weights_of(SMALL_31_TEXT), **{key: value})
    with pytest.raises(CheckpointError, match=key), open_checkpoint(folder):
        pass


def test_tensors_for_images_are_refused_where_no_key_speaks_of_images(tmp_path: Path) -> None:
    folder = write_mistral(tmp_path, SMALL_31_TEXT, weights_of(SMALL_31_TEXT))
    parts = {"vision_encoder.ln_pre.weight": torch.ones(4)}
    write_shards(folder, load_file(folder / "consolidated.safetensors") | parts, 1, "consolidated")
    with pytest.raises(UnsupportedModelError, match=r"vision_encoder.ln_pre.weight"), open_checkpoint(folder):
        pass
