"""LoRA adapters from files: what PEFT's arithmetic makes of them, and everything that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint.lora import AdapterWeights, read_adapter
from engine.errors import CheckpointError, UnsupportedModelError
from tests.engine.oracle import BASE
from tests.tiny_adapters import write_mistral, write_peft


def read(folder: Path, max_rank: int = 64, dtype: torch.dtype = torch.float32) -> AdapterWeights:
    return read_adapter(folder, BASE, max_rank, dtype)


def added_by(adapter: AdapterWeights) -> dict[str, Tensor]:
    """B · A of each module, by the name of the weight that it is added to."""
    return {
        f"model.layers.{layer}.{path}.weight": each.b.double() @ each.a.double()
        for layer, modules in enumerate(adapter.layers)
        for path, each in modules.items()
    }


def assert_adds(adapter: AdapterWeights, expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    added = added_by(adapter)
    assert added.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(added[name], delta, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 4, "alpha": 16},
        {"rank": 8, "alpha": 2.5, "rslora": True},
        {"rank": 1, "alpha": 1, "modules": ["q_proj", "v_proj"]},
        {"rank": 4, "alpha": 8, "modules": ["down_proj", "up_proj"], "layers": [1]},
        {"rank": 4, "alpha": 8, "ranks": {"k_proj": 2, "down_proj": 6}, "alphas": {"k_proj": 3.0, "o_proj": 32}},
        {"rank": 4, "alpha": 8, "rslora": True, "ranks": {"v_proj": 3}, "alphas": {"gate_proj": 1}},
    ],
    ids=["alpha / r", "rsLoRA", "two modules", "one layer", "patterns", "patterns of rsLoRA"],
)
def test_an_adapter_adds_scale_times_b_times_a(tmp_path: Path, options: dict[str, Any]) -> None:
    expected = write_peft(tmp_path, BASE, seed=3, **options)
    adapter = read(tmp_path)
    assert_adds(adapter, expected)
    assert adapter.rank == max(options["rank"], *options.get("ranks", {"-": 0}).values())


def test_bfloat16_files_and_targets_with_paths_are_read(tmp_path: Path) -> None:
    expected = write_peft(tmp_path, BASE, rank=4, alpha=4, modules=["q_proj", "up_proj"], dtype=torch.bfloat16)
    edit(tmp_path, target_modules=["self_attn.q_proj", "mlp.up_proj"])
    assert_adds(read(tmp_path), expected)
    assert all(each.a.dtype is torch.bfloat16 for each in read(tmp_path, dtype=torch.bfloat16).layers[0].values())


def test_a_pattern_in_target_modules_has_been_applied_when_the_file_was_written(tmp_path: Path) -> None:
    expected = write_peft(tmp_path, BASE, modules=["k_proj"], layers=[0, 2])
    edit(tmp_path, target_modules=r".*\.(0|2)\..*k_proj")
    assert_adds(read(tmp_path), expected)


def test_mistrals_own_adapters_are_read_with_their_scale_and_order_of_rows(tmp_path: Path) -> None:
    expected = write_peft(tmp_path / "peft", BASE, rank=4, alpha=4 * 3.5, seed=9)
    write_mistral(tmp_path / "mistral", BASE, rank=4, scaling=3.5, seed=9)
    assert_adds(read(tmp_path / "mistral"), expected)


# -- refused ---------------------------------------------------------------------------------------------------


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def retensor(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: each.clone() for name, each in change(load_file(file)).items()}, file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is set, which is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is set"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set"),
        ({"something_of_tomorrow": 1}, "something_of_tomorrow is set"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'; supported is 'LORA'"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules has 'lm_head'; supported are q_proj, k_proj"),
        ({"rank_pattern": {".*q_proj": 4}}, r"'\.\*q_proj' is a pattern; supported are names of modules"),
    ],
)
def test_what_is_more_than_lora_is_refused_with_the_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_peft(tmp_path, BASE, **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r 0 must be an integer between 1 and"),
        ({"lora_alpha": -1}, "lora_alpha -1 must be a positive number"),
        ({"r": 5}, "has rank 4 in the file, but 5 here"),
        ({"use_rslora": "yes"}, "use_rslora 'yes' must be true or false"),
        ({"target_modules": ["q_proj"]}, "but target_modules has q_proj"),
    ],
)
def test_a_configuration_that_contradicts_the_tensors_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_peft(tmp_path, BASE)
    edit(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path)


Q_A, Q_B = (f"base_model.model.model.layers.1.self_attn.q_proj.lora_{each}.weight" for each in "AB")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {Q_A: t[Q_A][:, :-1].clone()}, r"q_proj\.lora_A\.weight has shape \[4, 47\]; .* \['rank', 48\]"),
        (lambda t: t | {Q_B: t[Q_B][:-1].clone()}, r"q_proj\.lora_B\.weight has shape \[95, 4\]; .* \[96, 4\]"),
        (lambda t: t | {Q_B: torch.zeros(96, 3)}, r"lora_B\.weight has shape \[96, 3\]"),
        (lambda t: t | {Q_A: torch.zeros(0, 48), Q_B: torch.zeros(96, 0)}, r"lora_A\.weight has shape \[0, 48\]"),
        (lambda t: t | {Q_A: torch.tensor(1.0)}, r"lora_A\.weight has shape \[\]"),
        (
            lambda t: {name: each for name, each in t.items() if name != Q_B},
            "is there without its lora_B",
        ),
        (lambda t: t | {Q_A.replace(".1.", ".3."): t[Q_A]}, r"layers\.3\..*, but the model has 3 layers"),
        (
            lambda t: t | {"base_model.model.lm_head.lora_A.weight": t[Q_A]},
            "lm_head.*is no LoRA matrix",
        ),
        (lambda t: t | {"base_model.model.model.layers.0.self_attn.q_proj.bias": t[Q_A]}, "is no LoRA matrix"),
        (lambda t: t | {Q_A: torch.full((4, 48), float("nan"))}, r"lora_A\.weight has values that are not finite"),
        (lambda t: {}, "no tensors"),
    ],
)
def test_tensors_that_are_wrong_are_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    write_peft(tmp_path, BASE)
    retensor(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path)


def test_a_rank_above_the_limit_is_refused_with_both_numbers(tmp_path: Path) -> None:
    write_peft(tmp_path, BASE, rank=4, ranks={"o_proj": 9})
    assert read(tmp_path, max_rank=9).rank == 9
    with pytest.raises(CheckpointError, match=r"o_proj\.lora_A\.weight has rank 9; max_lora_rank is 8"):
        read(tmp_path, max_rank=8)


def test_files_that_are_missing_or_broken_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither adapter_config\.json nor lora\.safetensors is in this folder"):
        read(tmp_path / "nowhere")
    write_peft(tmp_path, BASE)
    weights = tmp_path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[:-1], whole[:100], b"", b"\xff" * 64):
        weights.write_bytes(broken)
        with pytest.raises(CheckpointError, match="adapter_model"):
            read(tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        read(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read(tmp_path)
