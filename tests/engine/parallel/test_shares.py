"""A model divided among ranks computes what the whole does: every size, every form of weights, every kind of file.

The ranks are threads here; `test_ranks` has them as processes.
"""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from engine.checkpoint import open_checkpoint
from engine.checkpoint.layout import expected_tensors
from engine.config import EngineConfig
from engine.errors import EngineConfigError
from engine.parallel.checkpoint import RankCheckpoint
from engine.parallel.communicator import Communicator, device_of_rank
from engine.parallel.share import piece_of, share_of, vocabulary
from engine.request import EngineInfo, SamplingParams
from engine.runner import Runner
from engine.sampler import Sampled
from engine.step import LAST_SAMPLED, RowInit, RowWork, SampledToken, StepPlan
from tests.engine.oracle import BASE, teacher_forced
from tests.engine.parallel.threads import divided_logits, load_rank, load_whole, on_ranks
from tests.fp8_models import write_fp8
from tests.tiny_models import config_json, model_config, write_consolidated, write_gguf, write_hf

# Eight heads for up to eight ranks, two of keys and values; a vocabulary that nothing divides.
SHAPE: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 163}
# Groups of 64 inputs in each of two shares.
WIDE: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 256,
}
PROMPTS = [[5, 6, 7, 8, 9, 110, 12, 13, 77, 31], [4], [90, 91, 92, 150, 1]]


def assert_same_logits(path: Path, size: int, precision: str = "auto", tolerance: float = 1e-4) -> None:
    expected = teacher_forced(load_whole(path, precision), PROMPTS)
    for of_rank in divided_logits(path, size, PROMPTS, precision):
        for actual, wanted in zip(of_rank, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)
            assert torch.equal(actual.argmax(-1), wanted.argmax(-1))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_logits_are_those_of_one_device(tmp_path: Path, size: int, tied: bool) -> None:
    """With four and eight ranks some have the same head of keys and values."""
    assert_same_logits(write_hf(tmp_path / "m", tie_word_embeddings=tied, **SHAPE), size)


def test_a_bias_is_divided_with_its_matrix(tmp_path: Path) -> None:
    assert_same_logits(write_hf(tmp_path / "m", architectures=["Qwen2ForCausalLM"], model_type="qwen2", **SHAPE), 4)


def test_rows_of_interleaved_heads_are_put_in_order(tmp_path: Path) -> None:
    assert_same_logits(write_consolidated(tmp_path / "m", **SHAPE), 4)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_codes_of_whole_groups_are_the_same_on_every_rank(tmp_path: Path, precision: str) -> None:
    assert_same_logits(write_hf(tmp_path / "m", **WIDE), 2, precision)


@pytest.mark.parametrize("precision", ["fp8-weight-only", "fp8"])
def test_scales_of_a_row_in_fp8_are_of_the_share(tmp_path: Path, precision: str) -> None:
    """A shorter row has a scale of its own, and so has a shorter vector of inputs: near, but not the same."""
    path = write_hf(tmp_path / "m", **WIDE)
    exact = teacher_forced(load_whole(path), PROMPTS)[0]
    rounded = teacher_forced(load_whole(path, precision), PROMPTS)[0]
    divided = divided_logits(path, 2, PROMPTS, precision)[1][0]
    assert (divided - exact).abs().mean() < 1.3 * (rounded - exact).abs().mean()


def test_in_bfloat16_the_sums_of_ranks_are_as_near_to_the_truth(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "m", **WIDE)
    exact = teacher_forced(load_whole(path), PROMPTS)[0]
    rounded = teacher_forced(load_whole(path, dtype=torch.bfloat16), PROMPTS)[0]
    divided = divided_logits(path, 2, PROMPTS, dtype=torch.bfloat16)[0][0]
    assert (divided - exact).abs().mean() < 1.5 * (rounded - exact).abs().mean()


@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q5_1", "Q8_0", "Q4_K_M", "Q5_K_M", "Q6_K"])
def test_files_of_llama_cpp_are_divided_between_their_groups(tmp_path: Path, kind: str) -> None:
    changes: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "intermediate_size": 512}
    assert_same_logits(write_gguf(tmp_path / "m.gguf", kind=kind, **changes), 2)


@pytest.mark.parametrize("kind", ["fp8-blocks", "modelopt-channels", "autofp8-static"])
def test_fp8_files_keep_their_scales(tmp_path: Path, kind: str) -> None:
    changes: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "intermediate_size": 512}
    assert_same_logits(write_fp8(tmp_path / "m", kind, **changes).folder, 2)


def test_what_cuts_a_group_in_two_is_refused_with_the_numbers(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", kind="Q8_0", **SHAPE)
    with pytest.raises(
        EngineConfigError,
        match=r"tensor_parallel_size: 8 cuts model\.layers\.0\.self_attn\.o_proj\.weight every 16 inputs, but the file "
        r"has a scale for every 32",
    ):
        on_ranks(8, lambda each: load_rank(path, each))


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"num_heads": 9, "num_kv_heads": 3}, 2),  # SmolLM2-135M
        ({"num_heads": 8, "num_kv_heads": 2, "intermediate_size": 70}, 4),
        ({"num_heads": 12, "num_kv_heads": 4}, 6),
    ],
)
def test_heads_and_width_must_be_whole(changes: dict[str, int], size: int) -> None:
    with pytest.raises(EngineConfigError, match=rf"^tensor_parallel_size: {size} must divide the model's"):
        share_of(replace(BASE, **changes), size)


def test_the_refusal_says_what_is_possible() -> None:
    smollm2 = replace(BASE, num_heads=9, num_kv_heads=3, intermediate_size=1536)
    with pytest.raises(EngineConfigError, match=r"9 attention heads .* 3 key-value heads .*; possible are 1, 3$"):
        share_of(smollm2, 2)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_pieces_of_all_ranks_are_the_whole(size: int) -> None:
    """Every number of a matrix is on one rank; of keys and values, on as many as share a head."""
    config = model_config(config_json(architectures=["Qwen2ForCausalLM"], **SHAPE))
    for name, shape in expected_tensors(config).items():
        counts = torch.zeros(shape)
        for rank in range(size):
            piece = piece_of(name, config, size, rank)
            if piece is None:
                assert "norm" in name
                counts += 1 / size
            elif len(shape) == 1:
                counts[piece.rows] += 1
            else:
                counts[piece.rows.start : piece.rows.stop, piece.columns.start : piece.columns.stop] += 1
        copies = max(1, size // 2) if "k_proj" in name or "v_proj" in name else 1
        torch.testing.assert_close(counts, torch.full(shape, float(copies)))


def test_query_heads_keep_their_key_head() -> None:
    """Of 8 query heads, four share each of the 2 key heads; rank 5 of 8 has query head 5 and with it key head 1."""
    config = model_config(config_json(**SHAPE))
    query = piece_of("model.layers.0.self_attn.q_proj.weight", config, 8, 5)
    key = piece_of("model.layers.0.self_attn.k_proj.weight", config, 8, 5)
    assert query is not None
    assert key is not None
    assert (query.rows, key.rows) == (range(5 * 16, 6 * 16), range(16, 32))


def test_the_first_ranks_take_what_is_left_of_a_vocabulary() -> None:
    shares = [vocabulary(163, 8, rank) for rank in range(8)]
    assert [len(share) for share in shares] == [21, 21, 21, 20, 20, 20, 20, 20]
    assert [token for share in shares for token in share] == list(range(163))


def test_ranks_together_read_what_the_file_has_of_matrices_once(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "m", **(SHAPE | {"num_key_value_heads": 8, "vocab_size": 160}))
    with open_checkpoint(path) as checkpoint:
        for name, shape in expected_tensors(checkpoint.config).items():
            parts = [RankCheckpoint(checkpoint, rank, 8).stored_bytes(name) for rank in range(8)]
            copies = 8 if len(shape) == 1 else 1
            assert sum(parts) == copies * checkpoint.stored_bytes(name)


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_of_rank("auto", rank, 2) for rank in range(2)] == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert device_of_rank("cpu", 3, 4) == torch.device("cpu")
    with pytest.raises(
        EngineConfigError, match=r"^tensor_parallel_size: 4 needs a GPU for each rank, but torch sees 2 here$"
    ):
        device_of_rank("cuda", 0, 4)


def test_ranks_agree_on_the_pages_of_the_one_with_the_least_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And on the context that these hold."""
    path = write_hf(tmp_path / "m", max_position_embeddings=100_000)
    config = EngineConfig(model_path=str(path), dtype="float32", threads=1, tensor_parallel_size=2)
    place = threading.local()

    def load(free: dict[int, int]) -> list[EngineInfo]:
        def of_rank(communicator: Communicator) -> EngineInfo:
            place.free = free[communicator.rank]
            return Runner.load(config, lambda phase, done: None, communicator).info

        return on_ranks(2, of_rank)

    monkeypatch.setattr("engine.runner.free_memory", lambda device: place.free)
    less, more = 57 * 10**7, 59 * 10**7  # the reserve of each is 256 MiB
    [poor, _], [rich, _] = load({0: less, 1: less}), load({0: more, 1: more})
    assert poor.kv_pages < rich.kv_pages
    assert poor.max_model_len < rich.max_model_len
    for info in load({0: more, 1: less}):
        assert (info.kv_pages, info.max_model_len) == (poor.kv_pages, poor.max_model_len)


@pytest.mark.parametrize("draws", ["alike", "apart"])
def test_a_token_that_no_plan_has_brought_is_that_of_the_first_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draws: str
) -> None:
    """With a lookahead a step goes on with what the device has sampled: whatever that was on other ranks."""
    path = write_hf(tmp_path / "m", **SHAPE)
    config = EngineConfig(model_path=str(path), dtype="float32", threads=1, lookahead=1)
    sampling = SamplingParams(temperature=0, logprobs=3)
    begin = StepPlan([RowWork(0, 0, [5, 6, 7], [0], sample=True)], [RowInit(0, sampling, 0, [5, 6, 7], [])])
    on = StepPlan([RowWork(0, 3, [LAST_SAMPLED], [], sample=True)])

    def second(runner: Runner) -> SampledToken:
        runner.launch(begin)
        return runner.launch(on).result().sampled[0]

    def of_rank(communicator: Communicator) -> SampledToken:
        divided = replace(config, tensor_parallel_size=communicator.size)
        runner = Runner.load(divided, lambda phase, done: None, communicator)
        if draws == "apart" and communicator.rank:
            sample = runner._sampler.sample

            def another(*arguments: Any) -> Sampled:
                sampled = sample(*arguments)
                return dataclasses.replace(sampled, token_ids=(sampled.token_ids + 1) % runner.info.vocab_size)

            monkeypatch.setattr(runner._sampler, "sample", another)
        return second(runner)

    whole = second(Runner.load(config, lambda phase, done: None))
    first = on_ranks(2, of_rank)[0]
    assert first.token_id == whole.token_id
    assert first.logprob is not None
    assert whole.logprob is not None
    assert first.logprob.logprob == pytest.approx(whole.logprob.logprob, abs=1e-4)
