"""GGUF files stay what they are: blocks are taken apart exactly, rows read few at a time, and the logits of a model are
those of the same weights in float32.

The reference of every value is the gguf package, which reads and dequantises the same file in its own way.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from engine.checkpoint import open_checkpoint
from engine.checkpoint.gguf_blocks import OTHER_NAMES, TYPES, TensorType
from engine.checkpoint.layout import expected_tensors
from engine.config import EngineConfig
from engine.errors import CheckpointError, UnsupportedModelError
from engine.quant.form import Form
from engine.quant.matrix import FloatMatrix, GroupMatrix
from engine.request import SamplingParams
from engine.runner import load_runner
from engine.step import RowInit, RowWork, StepPlan, Targets
from tests.engine.oracle import transformers_model
from tests.tiny_models import GGUF_HALVES, config_json, dequantised, random_blocks, random_weights, write_gguf

BLOCK_TYPES = [kind for kind in TYPES.values() if kind.floats is None]
FLOATS = ("F32", "F16", "BF16")
# Rows of 256 and 512, so that K-quants fit, and no square matrices.
K_SHAPES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 3,
}
QWEN: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}


# -- blocks -------------------------------------------------------------------------------------------------------


def test_the_types_are_those_of_ggml() -> None:
    for number, kind in TYPES.items():
        theirs = gguf.GGMLQuantizationType(number)
        assert kind.name == theirs.name
        assert gguf.GGML_QUANT_SIZES[theirs] == (kind.weights, kind.nbytes)
    assert OTHER_NAMES.items() <= {kind.value: kind.name for kind in gguf.GGMLQuantizationType}.items()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_any_block_is_what_the_reference_makes_of_it(kind: TensorType, seed: int) -> None:
    """Random bytes, and as scales any float16 that is a number: of both signs, subnormal, zero, up to the largest."""
    generator = np.random.default_rng(seed)
    raw = random_blocks(kind.name, 7 * 40, generator)
    for at in GGUF_HALVES[kind.name]:
        scales = generator.integers(0, 2**16, (len(raw), 1), dtype="<u2")
        scales[scales & 0x7C00 == 0x7C00] ^= 0x4000  # neither infinity nor NaN
        scales[:6, 0] = [0, 0x8000, 1, 0x8001, 0x7BFF, 0xFBFF]
        raw[:, at : at + 2] = scales.view(np.uint8)
    raw = raw.reshape(7, -1)
    matrix = kind.matrix(torch.from_numpy(raw))
    assert isinstance(matrix, GroupMatrix)
    assert int(matrix.codes.max()) < 2**matrix.bits
    assert matrix.shape == (7, 40 * kind.weights)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind.name])
    assert torch.equal(matrix.dequantise(), torch.from_numpy(expected))


@pytest.mark.parametrize(
    ("kind", "stored", "kept"),
    [
        ("Q4_0", 4.5, 5),
        ("Q4_1", 5, 5),
        ("Q5_0", 5.5, 6),
        ("Q5_1", 6, 6),
        ("Q8_0", 8.5, 8.5),
        ("Q4_K", 4.5, 5),
        ("Q5_K", 5.5, 6),
        ("Q6_K", 6.5625, 7),
    ],
)
def test_bits_per_weight_in_the_file_and_in_memory(kind: str, stored: float, kept: float) -> None:
    """At most a ninth more: scales of K-quants are stored in two levels and kept in one, and Q4_0 gets minima."""
    [found] = [each for each in BLOCK_TYPES if each.name == kind]
    matrix = found.matrix(torch.from_numpy(random_blocks(kind, 64, np.random.default_rng(0)).reshape(4, -1)))
    outputs, inputs = matrix.shape
    assert 8 * found.row_bytes(inputs) / inputs == stored
    assert 8 * Form.of(matrix).nbytes(outputs, inputs, float_bytes=2) / (outputs * inputs) == kept
    assert kept <= stored * 10 / 9


# -- matrices of a file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, QWEN], ids=["llama", "qwen2"])
@pytest.mark.parametrize("kind", [*FLOATS, *GGUF_HALVES, "Q4_K_M", "Q5_K_M"])
def test_every_tensor_is_what_the_reference_reads(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    path = write_gguf(tmp_path / "m.gguf", kind=kind, **K_SHAPES | changes)
    with open_checkpoint(path) as checkpoint:
        for name, expected in dequantised(path, checkpoint.config).items():
            assert torch.equal(checkpoint.read(name).float(), expected)


@pytest.mark.parametrize("kind", ["BF16", "Q4_K_M", "Q8_0"])
def test_rows_of_a_matrix_are_the_same_alone(tmp_path: Path, kind: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", kind=kind, **K_SHAPES)
    generator = torch.Generator().manual_seed(7)
    with open_checkpoint(path) as checkpoint:
        for name, shape in expected_tensors(checkpoint.config).items():
            if len(shape) == 1:
                continue
            whole = checkpoint.matrix(name).dequantise()
            for _ in range(6):
                start, stop = sorted(torch.randperm(shape[0] + 1, generator=generator)[:2].tolist())
                assert torch.equal(checkpoint.matrix(name, start, stop).dequantise(), whole[start:stop])


def test_only_the_rows_asked_for_are_read(tmp_path: Path) -> None:
    """Seen by what a file still gives that lost its end after it was opened."""
    path = write_gguf(tmp_path / "m.gguf", kind="Q4_K", **K_SHAPES)
    [last] = [each for each in gguf.GGUFReader(path).tensors if each.name == "blk.1.attn_q.weight"]
    row, name = last.n_bytes // 512, "model.layers.1.self_attn.q_proj.weight"
    with open_checkpoint(path) as checkpoint:
        whole = checkpoint.matrix(name, 0, 128).dequantise()
        with path.open("r+b") as file:
            file.truncate(last.data_offset + 128 * row)  # two heads of eight
        assert torch.equal(checkpoint.matrix(name, 70, 128).dequantise(), whole[70:])
        with pytest.raises(CheckpointError, match=r"truncated while it was read, in tensor \S+q_proj.weight"):
            checkpoint.matrix(name, 127, 129)


@pytest.mark.parametrize(("kind", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_floats_keep_their_width(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    with open_checkpoint(write_gguf(tmp_path / "m.gguf", kind=kind)) as checkpoint:
        for name in ("model.layers.0.self_attn.q_proj.weight", "lm_head.weight"):
            matrix = checkpoint.matrix(name)
            assert isinstance(matrix, FloatMatrix)
            assert matrix.values.dtype == dtype


# -- models -------------------------------------------------------------------------------------------------------


def log_probabilities(path: Path, tokens: list[int], **options: Any) -> Tensor:
    """[len(tokens) - 1, vocab] after each token but the last, by a runner loaded through its front door."""
    config = EngineConfig(model_path=str(path), device="cpu", threads=1, max_model_len=128, **options)
    runner = load_runner(config, lambda phase, done: None)
    vocab = runner.info.vocab_size
    work = RowWork(0, 0, tokens, [0, 1], sample=False, targets=Targets(1, tokens[1:], vocab))
    init = RowInit(0, SamplingParams(temperature=0.0), 0, tokens, [])
    [found] = runner.run(StepPlan(work=[work], admitted=[init])).targets.values()
    return torch.tensor([[value for _, value in sorted(each.top)] for each in found])


TOKENS = torch.randint(3, 160, (100,), generator=torch.Generator().manual_seed(8)).tolist()


def reference(path: Path) -> Tensor:
    """The same by transformers with the dequantised weights."""
    with open_checkpoint(path) as checkpoint:
        config = checkpoint.config
    weights = dequantised(path, config)
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    model = transformers_model(config)
    model.load_state_dict(weights)
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([TOKENS])).logits[0, :-1]
    return logits.log_softmax(-1)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("kind", ["Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_a_model_kept_quantised_is_the_same_model(tmp_path: Path, kind: str, tied: bool) -> None:
    path = write_gguf(tmp_path / "m.gguf", kind=kind, seed=9, tie_word_embeddings=tied, **K_SHAPES)
    expected = reference(path)
    assert expected.std() > 0.5  # far from uniform
    apart = 2e-2 if "_K" in kind else 2e-3  # scales of K-quants are products that float16 rounds
    torch.testing.assert_close(log_probabilities(path, TOKENS, dtype="float32"), expected, rtol=0, atol=apart)


def test_rows_that_are_no_whole_k_blocks_come_in_other_types(tmp_path: Path) -> None:
    narrow = {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 8}
    path = write_gguf(tmp_path / "m.gguf", kind="Q4_K_M", seed=10, **narrow)
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors} == {"F32", "Q5_0", "Q8_0"}
    torch.testing.assert_close(log_probabilities(path, TOKENS, dtype="float32"), reference(path), rtol=0, atol=2e-3)


@pytest.mark.parametrize(("precision", "apart"), [("bf16", 1e-4), ("int8", 0.3), ("fp8-weight-only", 1.0)])
def test_another_precision_converts_what_the_file_has(tmp_path: Path, precision: str, apart: float) -> None:
    """In float32, so that `bf16` (the compute dtype) loses nothing and the others lose what they lose."""
    path = write_gguf(tmp_path / "m.gguf", kind="Q4_K_M", seed=11, **K_SHAPES)
    expected = reference(path)
    found = log_probabilities(path, TOKENS, dtype="float32", precision=precision)
    difference = (found - expected).abs().max()
    print(f"\n{precision}: max |Δlogp| {difference:.2e}")
    assert difference < apart


# -- what is refused ----------------------------------------------------------------------------------------------


def change(path: Path, name: str, edit: Callable[[bytearray, int, int], object]) -> Path:
    """Edit the bytes of a file, given where a tensor's data and its entry of the directory (past the name) are."""
    content = bytearray(path.read_bytes())
    [tensor] = [each for each in gguf.GGUFReader(path).tensors if each.name == name]
    edit(content, tensor.data_offset, content.index(name.encode()) + len(name))
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [*FLOATS, *GGUF_HALVES])
def test_a_scale_or_weight_that_is_no_number_is_refused_by_name(tmp_path: Path, kind: str, number: float) -> None:
    path = write_gguf(tmp_path / "m.gguf", kind=kind, **K_SHAPES)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    data = {
        "F32": struct.pack("<f", number),
        "BF16": struct.pack("<f", number)[2:],
    }.get(kind, struct.pack("<e", number))
    for at in GGUF_HALVES.get(kind, (0,)):
        damaged = tmp_path / f"at-{at}.gguf"
        damaged.write_bytes(path.read_bytes())

        def edit(content: bytearray, start: int, entry: int, at: int = at) -> None:
            content[start + 5 * size + at : start + 5 * size + at + len(data)] = data

        change(damaged, "blk.1.ffn_up.weight", edit)
        with pytest.raises(CheckpointError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight") as caught:
            log_probabilities(damaged, TOKENS)
        assert "\n" not in str(caught.value)


def test_scales_that_multiply_beyond_float16_are_refused(tmp_path: Path) -> None:
    """The largest float16 times the largest of six bits would become infinite where it is kept."""
    path = write_gguf(tmp_path / "m.gguf", kind="Q4_K", **K_SHAPES)

    def edit(content: bytearray, start: int, entry: int) -> None:
        content[start : start + 16] = struct.pack("<ee", 60000.0, 1.0) + 12 * b"\xff"

    with pytest.raises(CheckpointError, match=r"down_proj.weight has a scale or minimum between \S+ and 3.78e\+06"):
        log_probabilities(change(path, "blk.0.ffn_down.weight", edit), TOKENS)


@pytest.mark.parametrize(("written", "window"), [(None, None), (0, None), (64, 64)])
def test_a_window_of_0_is_none(tmp_path: Path, written: int | None, window: int | None) -> None:
    with open_checkpoint(write_gguf(tmp_path / "model.gguf", sliding_window=written)) as checkpoint:
        assert checkpoint.config.sliding_window == window


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_factors_of_frequencies_that_are_not_positive_are_refused(tmp_path: Path, factor: float) -> None:
    factors = torch.ones(16 // 2)
    factors[3] = factor
    weights = random_weights(config_json()) | {"rope_freqs.weight": factors}
    with (
        pytest.raises(CheckpointError, match=r"rope_freqs.weight has .* it must be positive"),
        open_checkpoint(write_gguf(tmp_path / "model.gguf", weights=weights)),
    ):
        pass


@pytest.mark.parametrize("files", [1, 3])
def test_one_of_several_files_is_refused_with_how_to_join_them(tmp_path: Path, files: int) -> None:
    path = write_gguf(tmp_path / "m-00001-of-00003.gguf", split_files=files)
    if files == 1:
        with open_checkpoint(path):
            return
    with pytest.raises(UnsupportedModelError, match="one of 3 files; join them"), open_checkpoint(path):
        pass


def test_two_spellings_of_one_name_are_refused(tmp_path: Path) -> None:
    """`blk.00` for `blk.10` would replace `blk.0`."""
    path = write_gguf(tmp_path / "m.gguf", num_hidden_layers=11)
    path.write_bytes(path.read_bytes().replace(b"blk.10.attn_q.weight", b"blk.00.attn_q.weight"))
    with pytest.raises(CheckpointError, match="two names of tensors mean the same one"), open_checkpoint(path):
        pass


def test_a_name_that_is_no_printable_line_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.1\nfine:  weight"))
    with pytest.raises(CheckpointError, match=r"'blk.1\\nfine:  weight' is no name of a tensor"), open_checkpoint(path):
        pass


@pytest.mark.parametrize("number", [*OTHER_NAMES, 4, 5, 99, 2**32 - 1])
def test_types_that_are_not_read_are_named(tmp_path: Path, number: int) -> None:
    path = write_gguf(tmp_path / "m.gguf", kind="Q4_0")

    def edit(content: bytearray, start: int, entry: int) -> None:
        struct.pack_into("<I", content, entry + 4 + 2 * 8, number)

    change(path, "blk.0.ffn_up.weight", edit)
    shown = OTHER_NAMES.get(number, str(number))
    with (
        pytest.raises(UnsupportedModelError, match=rf"blk.0.ffn_up.weight has type {shown}; supported are F32"),
        open_checkpoint(path),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("blk.0.ffn_down.weight", "Q4_K", "rows of 96, not whole Q4_K blocks of 256"),
        ("output_norm.weight", "Q8_0", "is a vector in Q8_0; vectors must be F32, F16 or BF16"),
    ],
)
def test_blocks_where_none_fit_are_refused(tmp_path: Path, name: str, kind: str, reason: str) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    [dims] = [len(each.shape) for each in gguf.GGUFReader(path).tensors if each.name == name]

    def edit(content: bytearray, start: int, entry: int) -> None:
        struct.pack_into("<I", content, entry + 4 + dims * 8, gguf.GGMLQuantizationType[kind].value)

    with pytest.raises(CheckpointError, match=f"tensor {name}.*{reason}"), open_checkpoint(change(path, name, edit)):
        pass
