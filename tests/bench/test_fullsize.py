"""bench.fullsize: the checkpoints that it writes are what their publishers ship, and its report adds up."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import torch
from gguf import GGMLQuantizationType

from bench.checkpoints import FORMS, merges_of, write_checkpoint
from bench.vocabularies import TEKKEN, mistral_file
from engine.checkpoint import open_checkpoint
from engine.config import EngineConfig
from engine.gguf_header import read_header
from engine.request import SamplingParams
from engine.runner import load_runner
from engine.step import RowInit, RowWork, StepPlan
from service.models.family import NEMO_12B
from service.text.bpe import load_tekken
from service.text.load import load_text

TEKKEN_FILE = mistral_file(TEKKEN)
SMALL = msgspec.structs.replace(
    NEMO_12B, hidden_size=512, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_size=768
)
TEXT = "Rechnen 12345 + 67, это тест 한국어\n    return x"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By their form. Each has all of Tekken's 131,072 tokens and takes seconds to write."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {form: write_checkpoint(form, folder / form, SMALL, TEKKEN_FILE) for form in FORMS}


@pytest.mark.parametrize("form", FORMS)
def test_a_random_checkpoint_loads_and_gives_finite_logits(checkpoints: dict[str, Path], form: str) -> None:
    path = checkpoints[form]
    runner = load_runner(
        EngineConfig(model_path=str(path), max_model_len=64, max_batch_size=1), lambda phase, part: None
    )
    assert runner.info.num_parameters == open_num_parameters(path)
    sampling = SamplingParams(temperature=0.0, logprobs=1)
    init = RowInit(0, sampling, seed=0, prompt_token_ids=[5, 6, 7], output_token_ids=[])
    result = runner.run(
        StepPlan(work=[RowWork(row=0, start=0, token_ids=[5, 6, 7], new_pages=[0], sample=True)], admitted=[init])
    )
    assert result.sampled[0].failed is None
    assert load_text(path).tokenizer.encode(TEXT) == load_tekken(TEKKEN_FILE)[0].encode(TEXT)


def open_num_parameters(path: Path) -> int:
    with open_checkpoint(str(path)) as checkpoint:
        return checkpoint.num_parameters


def test_the_shards_are_in_the_index_and_the_weights_spread_as_a_real_models(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["bf16"]
    index = json.loads((path / "model.safetensors.index.json").read_bytes())
    assert set(index["weight_map"].values()) == {each.name for each in path.glob("*.safetensors")}
    with open_checkpoint(str(path)) as checkpoint:
        up = checkpoint.read("model.layers.1.mlp.up_proj.weight").float()
        norm = checkpoint.read("model.norm.weight").float()
    assert up.std().item() == pytest.approx(0.02, rel=0.1)
    assert norm.mean().item() == pytest.approx(1, abs=0.01)
    assert not torch.equal(up[0], up[1])


def test_a_gguf_file_has_the_mixture_of_q4_k_m(checkpoints: dict[str, Path]) -> None:
    tensors = read_header(checkpoints["gguf-q4_k_m"], lambda key: False).tensors
    types = {name: GGMLQuantizationType(tensor.ggml_type).name for name, tensor in tensors.items()}
    assert types["output.weight"] == "Q6_K"
    assert types["blk.0.attn_q.weight"] == "Q4_K"
    assert {types[f"blk.{layer}.ffn_down.weight"] for layer in range(4)} == {"Q4_K", "Q6_K"}


def test_merges_are_those_that_the_ranks_make() -> None:
    tokens = [bytes([value]) for value in range(256)] + [b"ab", b"cd", b"abc", b"abcd"]
    assert list(merges_of(tokens)) == [(b"a", b"b"), (b"c", b"d"), (b"ab", b"c"), (b"ab", b"cd")]
