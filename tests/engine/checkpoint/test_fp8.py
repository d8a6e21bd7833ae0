"""FP8 checkpoints of every publisher: the weights that its formula gives, the logits of transformers, and no guessing
where the configuration and the tensors do not agree."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from engine.checkpoint import open_checkpoint
from engine.checkpoint.fields import Fields
from engine.checkpoint.fp8_config import hf_claims
from engine.checkpoint.layout import expected_tensors
from engine.config import EngineConfig
from engine.errors import CheckpointError, UnsupportedModelError
from engine.local import LocalEngine
from engine.quant.matrix import Fp8Matrix
from engine.request import FinishReason, Request, SamplingParams
from tests.engine.oracle import engine_logprobs, from_transformers
from tests.fp8_models import DIALECTS, E4M3_MAX, Written, per_channel, write_fp8, write_mistral_fp8

Write = Callable[[Path], Written]
WRITERS: dict[str, Write] = {
    **{kind: (lambda folder, kind=kind: write_fp8(folder, kind, seed=11)) for kind in DIALECTS},
    "mistral-static": lambda folder: write_mistral_fp8(folder, static=True, seed=11),
    "mistral-dynamic": lambda folder: write_mistral_fp8(folder, static=False, seed=11),
    "mistral-channels": lambda folder: write_mistral_fp8(folder, static=False, quantise=per_channel, seed=11),
}
PROMPT = torch.randint(160, (40,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture(params=list(WRITERS))
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Written:
    return WRITERS[request.param](tmp_path)


def test_weights_are_the_publishers_codes_times_scales(written: Written) -> None:
    with open_checkpoint(written.folder) as checkpoint:
        for name in expected_tensors(checkpoint.config):
            assert torch.equal(checkpoint.read(name).float(), written.weights[name]), name


def test_any_rows_are_the_rows_of_the_whole(written: Written) -> None:
    generator = torch.Generator().manual_seed(0)
    with open_checkpoint(written.folder) as checkpoint:
        for name, shape in expected_tensors(checkpoint.config).items():
            if len(shape) != 2:
                continue
            for _ in range(4):
                start, stop = sorted(torch.randint(shape[0] + 1, (2,), generator=generator).tolist())
                part = checkpoint.matrix(name, start, stop)
                assert torch.equal(part.dequantise(), written.weights[name][start:stop]), (name, start, stop)
                assert isinstance(part, Fp8Matrix) == name.endswith("_proj.weight")


def test_scales_of_inputs_are_those_of_the_file(written: Written) -> None:
    with open_checkpoint(written.folder) as checkpoint:
        for name in expected_tensors(checkpoint.config):
            if name.endswith("_proj.weight"):
                matrix = checkpoint.matrix(name, 0, 1)
                assert isinstance(matrix, Fp8Matrix)
                assert matrix.input_scale == written.inputs.get(name.removesuffix(".weight"))


def transformers_of(written: Written) -> transformers.PreTrainedModel:
    """transformers over the weights as floats."""
    return from_transformers(written.config, written.weights)


def test_logits_are_those_of_transformers_over_the_same_weights(written: Written) -> None:
    with torch.inference_mode():
        expected = transformers_of(written)(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    found = engine_logprobs(written.folder, PROMPT, "fp8-weight-only")
    assert (found - expected[:-1]).abs().max() < 2e-4


@pytest.mark.parametrize("kind", ["fp8-mistral", "fp8-blocks"])
def test_logits_are_those_of_transformers_over_the_same_file(tmp_path: Path, kind: str) -> None:
    """It reads these two dialects itself. Its blocks must be whole."""
    whole = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 8}
    folder = write_fp8(tmp_path, kind, seed=14, **(whole if kind == "fp8-blocks" else {})).folder
    config = transformers.AutoConfig.from_pretrained(folder)
    config.quantization_config["dequantize"] = True
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    assert (engine_logprobs(folder, PROMPT, "fp8-weight-only") - expected[:-1]).abs().max() < 2e-4


class RoundedInputs(torch.nn.Module):
    """W8A8, slowly: inputs as e4m3 numbers times one scale of the file, or one per token."""

    def __init__(self, linear: torch.nn.Linear, scale: float | None) -> None:
        super().__init__()
        self._weight, self._bias, self._scale = linear.weight, linear.bias, scale

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / E4M3_MAX if self._scale is None else torch.tensor(self._scale)
        codes = (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        return functional.linear(codes.float() * scale, self._weight, self._bias)


def with_rounded_inputs(written: Written) -> transformers.PreTrainedModel:
    model = transformers_of(written)
    for name, module in list(model.named_modules()):
        if name.endswith("_proj"):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, RoundedInputs(module, written.inputs.get(name)))
    return model


def compare_rounded(written: Written) -> None:
    with torch.inference_mode():
        expected = with_rounded_inputs(written)(torch.tensor([PROMPT])).logits[0].log_softmax(-1)[:-1]
        floats = transformers_of(written)(torch.tensor([PROMPT])).logits[0].log_softmax(-1)[:-1]
    found = engine_logprobs(written.folder, PROMPT, "fp8")
    # An input that lies within float32's noise of the middle of two codes may take the other one; it is rare and small
    # beside what the rounding itself does.
    error, rounding = (found - expected).abs().mean(), (floats - expected).abs().mean()
    print(f"\nW8A8: mean |Δlogp| {error:.1e} from the reference, which is {rounding:.1e} from floats")
    assert error < 0.02 * rounding


def test_w8a8_is_the_slow_reference_with_static_or_dynamic_scales(written: Written) -> None:
    compare_rounded(written)


def test_fused_projections_with_scales_of_their_own_keep_them(tmp_path: Path) -> None:
    written = write_fp8(tmp_path, "autofp8-static", seed=12, shared_inputs=False)
    assert len(set(written.inputs.values())) == len(written.inputs)
    compare_rounded(written)


async def test_a_whole_engine_answers_as_transformers_does(written: Written) -> None:
    config = EngineConfig(
        model_path=str(written.folder), dtype="float32", precision="fp8-weight-only", threads=1, max_model_len=256
    )
    engine = await LocalEngine.start(config)
    try:
        request = Request(
            request_id="r",
            prompt_token_ids=PROMPT,
            sampling=SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
        )
        events = [event async for event in engine.generate(request)]
    finally:
        await asyncio.wait_for(engine.close(), 30)
    tokens = [token for event in events for token in event.token_ids]
    assert events[-1].finish_reason is FinishReason.LENGTH
    with torch.inference_mode():
        logits = transformers_of(written)(torch.tensor([PROMPT + tokens])).logits[0]
    assert tokens == logits[len(PROMPT) - 1 : -1].argmax(-1).tolist()


# -- files and configurations that do not agree ---------------------------------------------------------------------

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught, open_checkpoint(folder):
        pass
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text
    return text


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda t: t.pop(f"{Q}.weight_scale"), f"{Q}.weight has no {Q}.weight_scale"),
        (lambda t: t.pop(f"{K}.input_scale"), f"{K}.weight has inputs that .* calls static, but it has no input_scale"),
        (lambda t: t.update({f"{Q}.weight_scale": torch.ones(96, 1)}), r"q_proj.weight_scale has shape \[96, 1\]"),
        (lambda t: t.update({f"{Q}.weight_scale_inv": torch.ones(())}), "weight_scale is there beside"),
        (lambda t: t.update({f"{Q}.input_scale": torch.ones(2)}), r"input_scale has shape \[2\]"),
        (lambda t: t.update({f"{Q}.weight_scale": torch.tensor(0.0)}), "q_proj.weight_scale is a scale, but not all"),
        (lambda t: t.update({f"{Q}.weight_scale": torch.tensor(-1.0)}), "q_proj.weight_scale is a scale, but not all"),
        (lambda t: t.update({f"{Q}.weight_scale": torch.tensor(float("nan"))}), "q_proj.weight_scale is a scale, but"),
        (
            lambda t: t.update({f"{K}.input_scale": torch.tensor(float("inf"))}),
            "k_proj.input_scale is a scale, but not",
        ),
        (lambda t: t.update({f"{K}.weight_scale": torch.tensor(1)}), "k_proj.weight_scale has dtype I64"),
        (
            lambda t: t.update({"model.layers.0.self_attn.k_scale": torch.tensor(-1.0)}),
            "k_scale is a scale, but not all",
        ),
        (
            lambda t: t.update({"lm_head.weight_scale": torch.ones(())}),
            "lm_head.weight_scale is a scale, but of no FP8",
        ),
        (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].float()}), f"{Q}.weight is F32, but .* says FP8"),
        (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].to(torch.float8_e5m2)}), f"{Q}.weight has dtype F8_E5M2"),
        (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].to(torch.float8_e4m3fnuz)}), "has dtype F8_E4M3FNUZ"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}), "leaves it out"),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)}),
            "norm.weight has dty",
        ),
    ],
    ids=range(17),
)
def test_tensors_that_are_not_as_claimed_are_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], names: str
) -> None:
    folder = write_fp8(tmp_path, "autofp8-static").folder
    change_tensors(folder, change)
    assert re.search(names, refusal(folder)), refusal(folder)


def test_fp8_weights_that_no_configuration_speaks_of_are_refused(tmp_path: Path) -> None:
    folder = write_fp8(tmp_path, "modelopt").folder
    (folder / "hf_quant_config.json").unlink()
    assert "is F8_E4M3, but no configuration says how it is scaled" in refusal(folder)


def test_a_scale_of_inputs_is_refused_where_they_are_dynamic(tmp_path: Path) -> None:
    folder = write_fp8(tmp_path, "autofp8-dynamic").folder
    change_tensors(folder, lambda t: t.update({f"{Q}.input_scale": torch.ones(())}))
    assert "calls dynamic, but it has an input_scale" in refusal(folder)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_code_that_is_no_number_is_found_when_it_is_read(tmp_path: Path, code: int) -> None:
    folder = write_fp8(tmp_path, "autofp8-static").folder
    change_tensors(folder, lambda t: t[f"{K}.weight"].view(torch.uint8)[7, 9].fill_(code))
    with open_checkpoint(folder) as checkpoint:
        checkpoint.matrix(f"{K}.weight", 8, 32)
        with pytest.raises(CheckpointError, match=f"{K}.weight has values that are not finite"):
            checkpoint.matrix(f"{K}.weight", 0, 8)


def quantization(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"], **changes}


def compressed(weights: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    found = json.loads(json.dumps(DIALECTS["compressed-static"].config["quantization_config"]))
    found["config_groups"]["group_0"]["weights"].update(weights or {})
    return found | changes


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (quantization(quant_method="awq"), "quant_method 'awq' is not supported; supported: fp8, compressed-tensors"),
        (quantization(quant_method=None), "quant_method None"),
        (quantization(activation_scheme="block"), "activation_scheme 'block'"),
        (quantization(fmt="e5m2"), "fmt 'e5m2'"),
        (quantization(weight_block_size=[128]), r"weight_block_size \[128\] must be"),
        (quantization(weight_block_size=[128, 100]), r"weight_block_size \[128, 100\] must be"),
        (quantization(weight_block_size=[128, 128]), r"scaled per block, .* needs \[\[?1, 1"),
        (quantization(ignored_layers="lm_head"), "ignored_layers 'lm_head' must be a list"),
        (quantization(ignored_layers=["lm_head", Q]), f"{Q}.weight is F8_E4M3, but .* leaves it out"),
        (quantization(ignored_layers=["lm_head", "re:.*layers.1.mlp.*"]), "layers.1.mlp.gate_proj.weight is F8_E4M3"),
        (quantization(ignored_layers=["re:(a+)+$"]), "must be a pattern with at most"),
        (quantization(ignored_layers=["re:(a"]), "must be a regular expression"),
        (compressed(format="pack-quantized"), "format 'pack-quantized'"),
        (compressed({"num_bits": 4}), "num_bits 4"),
        (compressed({"type": "int"}), "type 'int'"),
        (compressed({"symmetric": False}), "symmetric False"),
        (compressed({"strategy": "group"}), "strategy 'group'"),
        (compressed(config_groups=None), "config_groups is missing"),
        (compressed(config_groups={"g": {"targets": ["re:.*_attn.*"], "weights": None}}), "leaves it out"),
        (compressed(kv_cache_scheme={"num_bits": 8, "type": "int"}), "type 'int'"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo 'NVFP4'"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "INT8"}, "kv_cache_quant_algo"),
        ("fp8", "quantization_config 'fp8' must be an object"),
    ],
)
def test_a_quantisation_that_is_not_read_is_named(tmp_path: Path, config: object, names: str) -> None:
    folder = write_fp8(tmp_path, "autofp8-static").folder
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"quantization_config": config})
    )
    assert re.search(names, refusal(folder)), refusal(folder)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"qformat_weight": "fp8_e5m2"}, "qformat_weight 'fp8_e5m2'"),
        ({"qscheme_act": "CHANNEL"}, "qscheme_act 'CHANNEL'"),
    ],
)
def test_another_quantisation_of_mistrals_own_form_is_named(tmp_path: Path, change: dict[str, str], names: str) -> None:
    folder = write_mistral_fp8(tmp_path, static=True).folder
    params = json.loads((folder / "params.json").read_text())
    params["quantization"] |= change
    (folder / "params.json").write_text(json.dumps(params))
    with pytest.raises(UnsupportedModelError, match=names), open_checkpoint(folder):
        pass


@pytest.mark.parametrize(
    ("ignored", "left_out"),
    [
        ("lm_head", "language_model.lm_head"),
        ("re:.*lm_head", "language_model.lm_head"),
        ("lm_head*", "lm_head"),
        ("*.mlp.*", "model.layers.0.mlp.up_proj"),
        ("re:.*(q|k)_proj$", Q),
    ],
)
def test_layers_are_left_out_by_name_pattern_or_wildcard(ignored: str, left_out: str) -> None:
    claims = hf_claims(Fields("x", {"quantization_config": quantization(ignored_layers=[ignored])}), Path("/absent"))
    assert claims is not None
    assert claims.scheme_of([left_out]) is None
    assert claims.scheme_of(["model.layers.0.self_attn.o_proj"]) is not None


def test_biases_beside_fp8_weights_are_used(tmp_path: Path) -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    written = write_fp8(tmp_path, "compressed-static", seed=15, **qwen)
    compare_rounded(written)


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_a_head_in_fp8_is_used(tmp_path: Path, precision: str) -> None:
    """Of a publisher who left nothing out."""
    written = write_fp8(tmp_path, "compressed-dynamic", seed=16)
    config = json.loads((tmp_path / "config.json").read_text())
    config["compression_config"]["ignore"] = []
    (tmp_path / "config.json").write_text(json.dumps(config))
    codes, scale = per_channel(written.weights["lm_head.weight"])
    written.weights["lm_head.weight"] = codes.float() * scale
    change_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": codes, "lm_head.weight_scale": scale}))
    with torch.inference_mode():
        expected = transformers_of(written)(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    assert (engine_logprobs(tmp_path, PROMPT, precision) - expected[:-1]).abs().max() < 2e-4


def test_floats_that_are_left_out_stay_floats_and_are_used(tmp_path: Path) -> None:
    """A checkpoint whose first layer was found too sensitive."""
    written = write_fp8(tmp_path, "compressed-dynamic", seed=13)
    config = json.loads((tmp_path / "config.json").read_text())
    config["compression_config"]["ignore"] = ["lm_head", "re:.*layers.0\\..*"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    prefix = "model.layers.0."

    def widen(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(prefix) and "_proj" in name]:
            tensors.pop(name)
            if name.endswith("_proj.weight"):
                written.weights[name] = written.weights[name].bfloat16().float()
                tensors[name] = written.weights[name].bfloat16()

    change_tensors(tmp_path, widen)
    with torch.inference_mode():
        expected = transformers_of(written)(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    assert (engine_logprobs(tmp_path, PROMPT, "auto") - expected[:-1]).abs().max() < 2e-4
