"""The decoder against transformers, for every feature of the family, on tiny random float32 models."""

from __future__ import annotations

import itertools

import msgspec
import pytest
import torch

from engine.errors import CheckpointError
from engine.face import Done
from engine.model.decoder import Decoder
from engine.model.fused import fuse
from engine.model.load import load_decoder
from engine.model.rope import inverse_frequencies, rope_table
from engine.ops.cpu import CpuOps
from engine.ops.reference import ReferenceOps
from engine.schemes import SCHEMES
from tests.compiled import compiled
from tests.engine.oracle import BASE, LLAMA3_SCALING, StateDict, decoder_of, teacher_forced, transformers_model

VARIANTS = {
    "llama, grouped heads, own head_dim": {},
    "tied head": {"tie_word_embeddings": True},
    "NeMo: theta 1e6, one query group of four": {"rope_theta": 1e6, "num_heads": 4, "num_kv_heads": 1},
    "llama 3.1 scaling": {"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING},
    "Mistral v0.1 window": {"architecture": "mistral", "sliding_window": 11},
    "Qwen2 bias": {"architecture": "qwen2", "qkv_bias": True, "head_dim": 8, "num_heads": 3, "num_kv_heads": 3},
}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def sequences(vocab_size: int, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers(name: str) -> None:
    config = msgspec.structs.replace(BASE, **VARIANTS[name])
    model = transformers_model(config)
    prompts = sequences(config.vocab_size, 150, 1, 40)
    actual = teacher_forced(decoder_of(config, model), prompts)
    for prompt, logits in zip(prompts, actual, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0]
        assert expected.std() > 0.3, "logits too flat for the comparison to mean anything"
        torch.testing.assert_close(logits, expected, **TOLERANCE)


def test_logits_do_not_depend_on_chunks_or_pages() -> None:
    decoder = decoder_of(BASE, transformers_model(BASE))
    prompts = sequences(BASE.vocab_size, 90, 33, 1, 64)
    whole = [teacher_forced(decoder, [prompt], chunk=512, page_size=512)[0] for prompt in prompts]
    for chunk, page_size in [(1, 1), (7, 16), (64, 5), (90, 64)]:
        for logits, expected in zip(teacher_forced(decoder, prompts, chunk, page_size), whole, strict=True):
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_with_our_own_matrix_kernels_no_bit_depends_on_chunks_batch_or_pages(
    precision: str, dtype: torch.dtype, kv_dtype: torch.dtype | None
) -> None:
    compiled(1)
    config = msgspec.structs.replace(BASE, hidden_size=64, intermediate_size=96, num_heads=4, sliding_window=50)
    source = StateDict(config, transformers_model(config).state_dict())
    decoder = load_decoder(source, dtype, torch.device("cpu"), 128, 1, lambda *progress: None, SCHEMES[precision])
    prompts = sequences(config.vocab_size, 90, 33, 1, 64)
    whole = [teacher_forced(decoder, [prompt], kv_dtype=kv_dtype)[0] for prompt in prompts]
    for chunk, page_size in [(1, 1), (7, 16), (64, 5), (90, 64)]:
        for logits, expected in zip(teacher_forced(decoder, prompts, chunk, page_size, kv_dtype), whole, strict=True):
            assert torch.equal(logits, expected)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_all_layers_in_one_call_are_the_loop_to_the_bit(
    name: str, dtype: torch.dtype, kv_dtype: torch.dtype | None, threads: int
) -> None:
    kernels = compiled(threads)
    config = msgspec.structs.replace(BASE, **VARIANTS[name])
    source = StateDict(config, transformers_model(config).state_dict())
    device = torch.device("cpu")
    weights = load_decoder(source, dtype, device, 512, threads, lambda *_: None, SCHEMES["int8"]).weights
    table = rope_table(config, 512, device)
    at_once = fuse(kernels, weights.layers, config, table)
    assert at_once is not None
    fused = Decoder(config, weights, CpuOps(kernels), table, at_once)
    looped = Decoder(config, weights, CpuOps(kernels), table)
    prompts = sequences(config.vocab_size, 300, 1, 64)
    for chunk in (1, 7, 512):
        actual = teacher_forced(fused, prompts, chunk, kv_dtype=kv_dtype)
        for logits, expected in zip(actual, teacher_forced(looped, prompts, 512, kv_dtype=kv_dtype), strict=True):
            assert torch.equal(logits, expected)


def test_layers_that_are_more_than_our_products_are_not_one_call() -> None:
    kernels = compiled(1)
    source, device = StateDict(BASE, transformers_model(BASE).state_dict()), torch.device("cpu")
    table = rope_table(BASE, 8, device)
    for precision, fits in {"bf16": False, "fp8-weight-only": True, "fp8": False}.items():  # oneDNN; ours; W8A8
        decoder = load_decoder(source, torch.float32, device, 8, 1, lambda *_: None, SCHEMES[precision])
        assert (fuse(kernels, decoder.weights.layers, BASE, table) is not None) == fits


# In FP8 the last bit of a float may become the fourth bit of a key.
@pytest.mark.parametrize(("kv_dtype", "tolerance"), [(None, 1e-5), (torch.float8_e4m3fn, 0.05)])
def test_the_compiled_kernels_and_plain_torch_agree_through_the_whole_model(
    kv_dtype: torch.dtype | None, tolerance: float
) -> None:
    config = msgspec.structs.replace(BASE, sliding_window=20)
    native = decoder_of(config, transformers_model(config))
    plain = Decoder(config, native.weights, ReferenceOps(), rope_table(config, 128, torch.device("cpu")))
    prompts = sequences(config.vocab_size, 70, 3)
    ours, plainly = (teacher_forced(decoder, prompts, kv_dtype=kv_dtype) for decoder in (native, plain))
    for actual, expected in zip(ours, plainly, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_bfloat16_stays_close_to_float32() -> None:
    model = transformers_model(BASE)
    prompts = sequences(BASE.vocab_size, 120)
    exact = teacher_forced(decoder_of(BASE, model), prompts)[0]
    rounded = teacher_forced(decoder_of(BASE, model, torch.bfloat16), prompts)[0]
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().mean() < 0.02 * exact.std()


def test_frequency_factors_divide_the_rotary_frequencies() -> None:
    factors = tuple(float(i) for i in range(1, 9))
    scaled = inverse_frequencies(msgspec.structs.replace(BASE, rope_freq_factors=factors))
    torch.testing.assert_close(scaled * torch.tensor(factors, dtype=torch.float64), inverse_frequencies(BASE))


def test_parameters_and_bytes_are_counted_once_for_a_tied_head() -> None:
    for tied in (False, True):
        config = msgspec.structs.replace(BASE, tie_word_embeddings=tied)
        model = transformers_model(config)
        assert decoder_of(config, model).weights.parameters == model.num_parameters()


def test_a_tensor_of_the_wrong_shape_is_refused_by_name() -> None:
    tensors = dict(transformers_model(BASE).state_dict())
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 5)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight: shape \(1, 5\) must be \(1, 48\)"):
        load_decoder(StateDict(BASE, tensors), torch.float32, torch.device("cpu"), 8, 1, lambda phase, done: None)


def test_loading_reports_its_progress_from_start_to_end() -> None:
    seen: list[Done] = []
    source = StateDict(BASE, transformers_model(BASE).state_dict())
    load_decoder(source, torch.float32, torch.device("cpu"), 8, 1, lambda phase, done: seen.append(done))
    total = sum(tensor.nbytes for tensor in source.tensors.values())
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (Done(0.0, 0, total), Done(1.0, total, total))
    largest = max(tensor.nbytes for tensor in source.tensors.values())
    steps = [after.read - before.read for before, after in itertools.pairwise(seen)]
    assert max(steps) <= largest  # every tensor is told of by itself
