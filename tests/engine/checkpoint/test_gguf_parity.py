"""Weights that stay quantised against the same weights as floats, on a real model: SmolLM2-135M-Instruct as it is
embedded, and as files that llama.cpp's own quantiser makes of it. `pytest -s` prints the figures.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from engine.checkpoint import open_checkpoint
from engine.checkpoint.layout import expected_tensors
from engine.config import ModelConfig
from engine.model.decoder import Decoder
from engine.model.load import load_decoder
from engine.schemes import SCHEMES
from service.text.load import load_text
from tests.engine.oracle import teacher_forced
from tests.tiny_models import write_gguf

TOKENS = 300
LAYERS = 16  # of 30, in what llama.cpp's quantiser makes of it: its mixtures change every eighth of a model


def load(path: Path, precision: str) -> Decoder:
    """In float32; `bf16` is the compute dtype, so that its weights are those of the file, dequantised."""
    with torch.inference_mode(), open_checkpoint(path) as checkpoint:
        return load_decoder(
            checkpoint,
            torch.float32,
            torch.device("cpu"),
            TOKENS,
            torch.get_num_threads(),
            lambda phase, done: None,
            SCHEMES[precision],
        )


@pytest.fixture(scope="module")
def prompt(smollm2_path: Path) -> list[int]:
    return list(load_text(smollm2_path).tokenizer.encode(Path(argparse.__file__).read_text()[:6000]))[:TOKENS]


def compare(name: str, path: Path, prompt: list[int]) -> tuple[float, float, float]:
    """Of the logits after every token: the largest difference, mean KL divergence in nats, share of same choices."""
    kept, floats = load(path, "auto"), load(path, "bf16")
    size = path.stat().st_size
    assert kept.weights.nbytes < 1.1 * size < 0.3 * floats.weights.nbytes
    [actual], [expected] = teacher_forced(kept, [prompt]), teacher_forced(floats, [prompt])
    log_p, log_q = expected.log_softmax(-1), actual.log_softmax(-1)
    worst = (expected - actual).abs().max().item()
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    same = (expected.argmax(-1) == actual.argmax(-1)).float().mean().item()
    print(
        f"\n{name}: {size / 2**20:.0f} MiB of file, x{kept.weights.nbytes / size:.3f} in memory; "
        f"{len(prompt)} tokens, max |Δlogit| {worst:.1e}, mean KL {divergence:.1e}, argmax {same:.1%}"
    )
    return worst, divergence, same


def test_the_embedded_model_is_the_same_kept_as_its_file_stores_it(smollm2_path: Path, prompt: list[int]) -> None:
    """Its scales (Q4_1 and Q8_0) are float16 in the file too, so nothing is rounded."""
    worst, _, same = compare("embedded", smollm2_path, prompt)
    assert worst <= 1e-3
    assert same == 1.0


def quantise(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """By ggml itself, which the wheel of llama.cpp has inside."""
    if kind == gguf.GGMLQuantizationType.F32:
        return values
    function = ctypes.CDLL(pytest.importorskip("xllamacpp.xllamacpp").__file__).ggml_quantize_chunk
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    function.restype = ctypes.c_size_t
    block, size = gguf.GGML_QUANT_SIZES[kind]
    out = np.empty((len(values), values.shape[1] // block * size), np.uint8)
    written = function(kind.value, values.ctypes.data, out.ctypes.data, 0, *values.shape, None)
    assert written == out.nbytes
    return out


@pytest.fixture(scope="module")
def shape(smollm2_path: Path) -> ModelConfig:
    with open_checkpoint(smollm2_path) as checkpoint:
        return replace(checkpoint.config, num_layers=LAYERS)


@pytest.fixture(scope="module")
def weights(smollm2_path: Path, shape: ModelConfig) -> dict[str, Tensor]:
    with open_checkpoint(smollm2_path) as checkpoint:
        return {name: checkpoint.read(name).float() for name in expected_tensors(shape)}


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"])
def test_files_of_llama_cpps_quantiser_are_the_same_kept_as_they_are(
    tmp_path: Path, shape: ModelConfig, weights: dict[str, Tensor], prompt: list[int], kind: str
) -> None:
    """Rows of 1,536 become K-quants, whose scales are rounded; those of 576 what llama.cpp takes instead."""
    same_names = ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "rope_theta", "rms_norm_eps")
    fields = {name: getattr(shape, name) for name in same_names} | {
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": shape.max_position_embeddings,
        "tie_word_embeddings": shape.tie_word_embeddings,
    }
    path = write_gguf(tmp_path / "m.gguf", kind=kind, weights=weights, quantise=quantise, **fields)
    _, divergence, same = compare(kind, path, prompt)
    assert divergence <= 3e-5  # measured: 1e-6. Quantising to Q4_K itself costs 7e-2 of the whole model
    assert same >= 0.99
