"""LoRA in the decoder: the logits are those of a model whose weights were merged, whatever else is in the batch."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from msgspec.structs import replace
from torch import Tensor

from engine.adapters import projections, slot_size
from engine.checkpoint.lora import LowRank
from engine.errors import AdapterLimitError, CheckpointError
from engine.memory import Device, plan_memory
from engine.model.cache import KVCache
from engine.model.decoder import Decoder, Layer
from engine.model.lora import Delta, LoraPool, Segment, reference_delta
from engine.ops import load_kernels
from engine.quant import Linear, Part, Target, build_linear
from engine.quant.matrix import FloatMatrix
from engine.rows import Rows
from engine.runner import Runner
from engine.schemes import Kept
from engine.sizing import CacheSize
from engine.step import RowWork
from tests.engine.oracle import BASE, decoder_of, transformers_model
from tests.engine.test_memory import NEMO, OPTIONS
from tests.tiny_adapters import MODULES, random_pairs, write_peft

CPU = torch.device("cpu")
PAGE = 16
ADAPTERS = {  # name -> how it is written
    "all": {"rank": 4, "alpha": 8, "seed": 1},
    "wide": {"rank": 8, "alpha": 4, "rslora": True, "seed": 2},
    "some": {"rank": 3, "alpha": 3, "modules": ("k_proj", "up_proj", "down_proj"), "layers": (0, 2), "seed": 3},
    "mixed": {"rank": 2, "alpha": 6, "ranks": {"v_proj": 5, "gate_proj": 1}, "alphas": {"v_proj": 2}, "seed": 4},
}


@pytest.fixture(scope="module")
def base() -> transformers.PreTrainedModel:
    return transformers_model(BASE)


@pytest.fixture(scope="module")
def decoder(base: transformers.PreTrainedModel) -> Decoder:
    return decoder_of(BASE, base)


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    """Each of ADAPTERS: its folder, and what it adds to the weights."""
    root = tmp_path_factory.mktemp("adapters")
    return {name: (root / name, write_peft(root / name, BASE, **how)) for name, how in ADAPTERS.items()}


@torch.no_grad()
def merged(base: transformers.PreTrainedModel, added: dict[str, Tensor]) -> transformers.PreTrainedModel:
    """transformers' model in float64 with W + scale · B · A."""
    model = copy.deepcopy(base).double()
    parameters = dict(model.named_parameters())
    for name, delta in added.items():
        parameters[name] += delta
    return model


@torch.no_grad()
def merged_logits(base: transformers.PreTrainedModel, added: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """float64 [len(tokens), vocab]."""
    return merged(base, added)(torch.tensor([tokens])).logits[0]


def filled_pool(added: dict[str, tuple[Path, dict[str, Tensor]]], dtype: torch.dtype = torch.float32) -> LoraPool:
    """All adapters, number n in slot n."""
    pool = LoraPool(BASE, len(added), 8, dtype, CPU)
    for number, (folder, _) in enumerate(added.values()):
        pool.keep(number, pool.read(str(folder)))
        pool.fill(number, number)
    return pool


@torch.inference_mode()
def logits_of(
    decoder: Decoder, pool: LoraPool, batch: Sequence[tuple[list[int], int | None]], chunk: int
) -> list[Tensor]:
    """Logits [len, vocab] after every token of each (tokens, slot), computed side by side, `chunk` tokens a step."""
    pages = [-(-len(tokens) // PAGE) for tokens, _ in batch]
    cache = KVCache.allocate(BASE, sum(pages), PAGE, decoder.dtype, CPU)
    rows = Rows(len(batch), max(pages), PAGE, CPU)
    free = iter(range(sum(pages)))
    tables = [[next(free) for _ in range(count)] for count in pages]
    for row, (_, slot) in enumerate(batch):
        rows.clear(row, slot)
    outputs: list[list[Tensor]] = [[] for _ in batch]
    for start in range(0, max(len(tokens) for tokens, _ in batch), chunk):
        work = [
            RowWork(row, start, tokens[start : start + chunk], tables[row] if start == 0 else [], False)
            for row, (tokens, _) in enumerate(batch)
            if start < len(tokens)
        ]
        work, segments = rows.by_adapter(work)
        step = rows.batch(work)
        layers = pool.around(decoder.weights.layers, segments)
        hidden = decoder.forward(step.token_ids, step.attention, cache, layers)
        logits = decoder.logits(hidden, torch.arange(len(hidden)))
        for item, part in zip(work, logits.split([len(item.token_ids) for item in work]), strict=True):
            outputs[item.row].append(part)
    return [torch.cat(parts) for parts in outputs]


def prompt(seed: int, length: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(BASE.vocab_size) for _ in range(length)]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_logits_of_a_mixed_batch_are_those_of_merged_weights(
    base: transformers.PreTrainedModel,
    decoder: Decoder,
    added: dict[str, tuple[Path, dict[str, Tensor]]],
    chunk: int,
) -> None:
    names = [None, *added, "all", None, "some"]
    batch = [(prompt(seed, 5 + 9 * seed), name) for seed, name in enumerate(names)]
    slots = {name: slot for slot, name in enumerate(added)}
    found = logits_of(decoder, filled_pool(added), [(t, None if n is None else slots[n]) for t, n in batch], chunk)
    for (tokens, name), logits in zip(batch, found, strict=True):
        expected = merged_logits(base, {} if name is None else added[name][1], tokens)
        torch.testing.assert_close(logits.double(), expected, atol=2e-4, rtol=0)


def test_each_adapter_changes_what_the_model_says(
    base: transformers.PreTrainedModel, added: dict[str, tuple[Path, dict[str, Tensor]]]
) -> None:
    tokens = prompt(1, 40)
    said = [merged_logits(base, weights, tokens) for weights in ({}, *(each for _, each in added.values()))]
    for one in range(len(said)):
        for other in range(one):
            assert (said[one] - said[other]).abs().max() > 0.5  # 2,500 times the tolerance above


def test_a_mixed_batch_says_what_each_says_alone(
    decoder: Decoder, added: dict[str, tuple[Path, dict[str, Tensor]]]
) -> None:
    pool = filled_pool(added)
    batch = [(prompt(seed, 30), slot) for seed, slot in enumerate([0, None, 2, 0, 1, None, 3])]
    together = logits_of(decoder, pool, batch, chunk=16)
    for one, logits in zip(batch, together, strict=True):
        [alone] = logits_of(decoder, pool, [one], chunk=16)
        torch.testing.assert_close(logits, alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("slots", [torch.bfloat16, torch.float32])
def test_in_bfloat16_it_is_as_near_as_weights_that_were_merged(
    base: transformers.PreTrainedModel, added: dict[str, tuple[Path, dict[str, Tensor]]], slots: torch.dtype
) -> None:
    tokens, pool, bf16 = prompt(3, 50), filled_pool(added, slots), torch.bfloat16
    beside, inside = decoder_of(BASE, base, bf16), decoder_of(BASE, merged(base, added["all"][1]), bf16)
    exact = merged_logits(base, added["all"][1], tokens)
    [with_slot], [with_merged] = (
        logits_of(decoder, pool, [(tokens, slot)], chunk=64) for decoder, slot in ((beside, 0), (inside, None))
    )
    assert (with_slot - exact).norm() < 1.5 * (with_merged - exact).norm()


# -- one matrix ------------------------------------------------------------------------------------------------


def random_modules(seed: int, modules: Sequence[str]) -> dict[str, LowRank]:
    ranks = {module: 1 + (seed + index) % 5 for index, module in enumerate(modules)}
    return {path: LowRank(a, b) for (_, path), (a, b) in random_pairs(BASE, ranks, [0], seed).items()}


@pytest.mark.parametrize("projection", projections(BASE), ids=lambda each: each.name)
def test_what_is_added_to_a_matrix_is_the_reference(projection: object) -> None:
    [projection] = [each for each in projections(BASE) if each == projection]
    generator = torch.Generator().manual_seed(7)
    choices = [random_modules(seed, random.Random(seed).sample(MODULES, 5)) for seed in range(4)]
    tokens = [3, 1, 4]  # of each adapter
    x = torch.randn(sum(tokens) + 2, projection.inputs, generator=generator)
    y = torch.zeros(len(x), sum(projection.modules.values()))
    start = 2  # the first two have no adapter
    for modules, count in zip(choices, tokens, strict=False):
        if (delta := Delta.of(projection, modules)) is not None:
            delta.add(x[start : start + count], y[start : start + count])
        start += count
    owners = [None, None, *(each for each, count in zip(choices, tokens, strict=False) for _ in range(count))]
    torch.testing.assert_close(y.double(), reference_delta(x, owners, projection), atol=1e-5, rtol=0)


WIDE = replace(BASE, hidden_size=64, num_heads=6, num_kv_heads=2, head_dim=16, intermediate_size=96, num_layers=1)


@pytest.mark.parametrize("with_kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kept", Kept)
@torch.inference_mode()
def test_the_same_is_added_to_a_matrix_of_any_precision(
    tmp_path: Path, kept: Kept, dtype: torch.dtype, with_kernels: bool
) -> None:
    target = Target(dtype, CPU, load_kernels(1) if with_kernels else None)
    generator = torch.Generator().manual_seed(11)

    def linear(outputs: int, inputs: int) -> Linear:
        weight = FloatMatrix(torch.randn(outputs, inputs, generator=generator) * inputs**-0.5)
        return build_linear(
            [Part(lambda start, stop: FloatMatrix(weight.values[start:stop]), outputs)], inputs, kept, target
        )

    maps = {each.name: linear(sum(each.modules.values()), each.inputs) for each in projections(WIDE)}
    layer = Layer(attention_norm=torch.ones(64), mlp_norm=torch.ones(64), **maps)
    added = write_peft(tmp_path, WIDE, rank=4, alpha=8)
    pool = LoraPool(WIDE, 1, 4, torch.float32, CPU)
    pool.keep(0, pool.read(str(tmp_path)))
    pool.fill(0, 0)
    [adapted] = pool.around([layer], [Segment(0, 2, 5)])
    for each in projections(WIDE):
        x = torch.randn(7, each.inputs, generator=generator).to(dtype)
        delta = torch.cat([added[f"model.layers.0.{module}.weight"] for module in each.modules])
        expected = maps[each.name](x).double()
        expected[2:5] += x[2:5].double() @ delta.t()
        torch.testing.assert_close(getattr(adapted, each.name)(x), expected.to(dtype), atol=1e-5, rtol=0.01)


# -- the pool --------------------------------------------------------------------------------------------------


def test_a_slot_holds_whatever_was_filled_in_last(
    decoder: Decoder, added: dict[str, tuple[Path, dict[str, Tensor]]]
) -> None:
    pool, full, tokens = LoraPool(BASE, 1, 8, torch.float32, CPU), filled_pool(added), prompt(5, 20)
    for number, (folder, _) in enumerate(added.values()):
        pool.keep(number, pool.read(str(folder)))
    for number in (0, 1, 3, 2, 1, 0):  # from large to small and back
        pool.fill(0, number)
        [swapped] = logits_of(decoder, pool, [(tokens, 0)], chunk=32)
        [own] = logits_of(decoder, full, [(tokens, number)], chunk=32)
        assert torch.equal(swapped, own)


def test_a_slot_is_just_large_enough_for_the_rank_limit_on_every_matrix(tmp_path: Path) -> None:
    write_peft(tmp_path, BASE, rank=8)
    pool = LoraPool(BASE, 1, 8, torch.float32, CPU)
    assert pool.read(str(tmp_path)).nbytes == slot_size(BASE, 8) * 4
    write_peft(tmp_path, BASE, rank=9)
    with pytest.raises(CheckpointError, match="max_lora_rank is 8"):
        pool.read(str(tmp_path))


def test_an_adapter_that_the_host_has_no_memory_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_peft(tmp_path, BASE)
    monkeypatch.setattr("engine.model.lora.free_memory", lambda device: 1000)
    with pytest.raises(AdapterLimitError, match=r"bytes, but 1000 bytes of the host's memory are free"):
        LoraPool(BASE, 1, 8, torch.float32, CPU).read(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_memory_plan_counts_the_slots(base: transformers.PreTrainedModel, dtype: torch.dtype) -> None:
    device, options = Device(kind="cpu", free=10**9, float_bytes=dtype.itemsize), replace(OPTIONS, max_lora_rank=8)
    without = plan_memory(BASE, options, device)
    planned = plan_memory(BASE, replace(options, max_loras=3), device)
    runner = Runner(replace(options, max_loras=3), decoder_of(BASE, base, dtype), CacheSize(4, 64, 1))
    assert runner.adapters is not None
    assert planned.adapters == runner.adapters.nbytes == without.cache - planned.cache > 0
    assert without.adapters == 0


def test_a_slot_for_mistral_nemo_takes_218_mib_on_a_gpu() -> None:
    options = replace(OPTIONS, max_loras=1, max_lora_rank=32)
    planned = plan_memory(NEMO, options, Device(kind="cuda", free=80 * 2**30))
    assert planned.adapters / 2**20 == pytest.approx(217.5)


def test_rows_of_an_adapter_stand_side_by_side_and_nobody_moves_without_one() -> None:
    rows = Rows(6, 1, PAGE, CPU)
    for row, slot in enumerate([None, 1, 0, None, 1, 0]):
        rows.clear(row, slot)
    work = [RowWork(row, 0, [0] * (row + 1), [], False) for row in (4, 0, 2, 3, 1)]
    ordered, segments = rows.by_adapter(work)
    assert [item.row for item in ordered] == [0, 3, 2, 4, 1]
    assert segments == [Segment(0, 5, 8), Segment(1, 8, 15)]
    plain = [work[1], work[3]]
    assert rows.by_adapter(plain) == (plain, [])
