"""What is said to fit is what the engine allocates, and what is known of the published model."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from engine import EngineConfig, EngineConfigError
from engine.ops import load_kernels
from engine.probe import Gpu, Machine, Weights, probe
from engine.runner import Runner
from engine.schemes import SCHEMES
from service.cli.report import profile_table
from service.models import catalog
from service.models.fit import GIB, Fit, Place, Subject, fit
from service.models.gpus import KNOWN_GPUS, find_gpu, recognise
from service.models.machine import look
from service.models.profiles import profiles, settings_of
from tests.engine.parallel.threads import load_rank, on_ranks
from tests.tiny_models import MID, write_gguf, write_hf

OPTIONS = EngineConfig(model_path="-")
NEMO = catalog.CATALOG["mistral-nemo-12b-instruct"]


def on(gpu: str, **options: Any) -> Fit:
    return fit(Subject.of_entry(NEMO), Place.of_gpu(find_gpu(gpu)), msgspec.structs.replace(OPTIONS, **options))


# -- the arithmetic against real engines -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "safetensors": write_hf(folder / "hf", dtype=torch.bfloat16, **MID),
        "Q8_0": write_gguf(folder / "q8.gguf", kind="Q8_0", **MID),
        "Q4_0": write_gguf(folder / "q4.gguf", kind="Q4_0", **MID),
        "smollm2": smollm2_path,
    }


@pytest.fixture(scope="module")
def seen(models: Mapping[str, Path]) -> Mapping[str, Weights]:
    """The models as `nemoserve doctor` looks at them, which does so in a process of its own."""
    looked = {name: probe("cpu", "bfloat16", str(path)).weights for name, path in models.items()}
    return {name: weights for name, weights in looked.items() if weights is not None}


def tensor_bytes() -> int:
    """Of all tensors of this process, each storage once."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor) and each.layout is torch.strided:
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize(
    ("name", "precision", "kv_precision"),
    [
        *(("safetensors", precision, "auto") for precision in SCHEMES),
        *((name, "auto", "auto") for name in ("Q8_0", "Q4_0", "smollm2")),
        ("Q4_0", "int8", "auto"),
        *((name, "auto", "fp8") for name in ("safetensors", "Q4_0", "smollm2")),
        ("safetensors", "fp8", "fp8"),
    ],
)
def test_what_fits_is_what_an_engine_allocates(
    models: Mapping[str, Path],
    seen: Mapping[str, Weights],
    name: str,
    precision: str,
    kv_precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a machine with little memory, half of which is for the KV cache: weights, cache and tokens within 2 %."""
    free, rows = 1200 * 2**20, 32 if name == "smollm2" else 640  # so that half of what is left is too little
    options = EngineConfig(
        model_path=str(models[name]),
        dtype="bfloat16",
        device="cpu",
        precision=precision,
        kv_precision=kv_precision,
        max_batch_size=rows,
        max_batch_tokens=640,
        threads=1,
    )
    kernels = load_kernels(1) is not None
    place = Place(slug="cpu", name="a small CPU", kind="cpu", free=free, kernels=kernels)
    told = fit(Subject.of_file(name, seen[name]), place, options)
    monkeypatch.setattr("engine.runner.free_memory", lambda device: free)
    before = tensor_bytes()
    runner = Runner.load(options, lambda phase, done: None)
    taken = tensor_bytes() - before

    assert told.reason is None
    assert runner.info.kv_pages * runner.info.page_size == pytest.approx(told.taken, rel=0.02)
    assert runner.info.weight_bytes == pytest.approx(told.plan.weights, rel=0.02)
    cache = told.taken * told.plan.token_bytes
    assert told.plan.cache / 2 >= cache > 0.4 * told.plan.cache
    assert taken == pytest.approx(told.plan.weights + told.plan.tables + cache, rel=0.02)


def test_a_file_and_its_shape_take_the_same(models: Mapping[str, Path], seen: Mapping[str, Weights]) -> None:
    by_file = Subject.of_file("a", seen["safetensors"])
    by_shape = Subject(name="b", shape=by_file.shape, stored="bf16")
    for precision in SCHEMES:
        shape = by_file.shape
        assert by_file.weight_bytes(precision, 2, shape) == by_shape.weight_bytes(precision, 2, shape)
    assert by_file.parameters == seen["safetensors"].parameters


# -- NeMo --------------------------------------------------------------------------------------------------------------


def test_nemo_is_as_large_as_published() -> None:
    assert Subject.of_entry(NEMO).parameters == 12_247_782_400
    assert on("h100").plan.token_bytes == 160 * 1024
    assert on("h100", kv_precision="fp8").plan.token_bytes == 82.5 * 1024


def test_sequences_are_whole_pages_of_the_longest_context() -> None:
    found = on("h100", precision="fp8", max_model_len=100_001)
    assert (found.tokens // 64) // -(-100_001 // 64) == found.sequences > 0
    assert on("h100", precision="fp8").sequences == found.tokens // 131072


def test_what_lacks_is_told_in_gib_and_adds_up() -> None:
    found = on("l4")
    plan = found.plan
    assert (found.tokens, found.sequences, found.taken) == (0, 0, 0)
    short = (plan.weights + plan.tables + plan.adapters + plan.workspace + plan.reserve - plan.free) / GIB
    assert found.reason is not None
    assert found.reason.startswith(f"{short:.2f} GiB short: 22.81 GiB of weights and ")


def test_a_context_that_does_not_fit_is_a_reason_and_one_that_is_not_asked_for_is_tight() -> None:
    asked, free = on("l4", precision="fp8", max_model_len=60_000), on("l4", precision="fp8")
    assert asked.reason is not None
    assert "max_model_len: 60000 needs 9.16 GiB of KV cache" in asked.reason
    assert (free.reason, free.tight) == (None, True)
    assert on("l4", precision="fp8", max_model_len=60_000, kv_precision="fp8").reason is None


def test_a_precision_that_a_file_refuses_says_so() -> None:
    weights = Weights(model=NEMO.shape, parameters=1, nbytes={"auto": 1}, refused={"fp8": "block scales of 128"})
    found = fit(Subject.of_file("x", weights), Place.of_size(100), msgspec.structs.replace(OPTIONS, precision="fp8"))
    assert (found.reason, found.tokens) == ("block scales of 128", 0)


def test_options_that_are_wrong_for_any_model_are_an_error() -> None:
    with pytest.raises(EngineConfigError, match="max_batch_tokens: 3 must be at least max_batch_size"):
        on("h100", max_batch_size=4, max_batch_tokens=3)


# -- GPUs by name ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "slug"),
    [("h100", "h100"), ("H100 80GB", "h100"), ("a100-80", "a100-80gb"), ("A100 40 GB", "a100-40gb"), ("l4", "l4"),
     ("L40S", "l40s"), ("rtx-4090", "rtx4090")],
)  # fmt: skip
def test_a_gpu_is_found_by_what_people_call_it(name: str, slug: str) -> None:
    assert find_gpu(name).slug == slug


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a100", "may be a100-40gb or a100-80gb"),
        ("", "is not among l4"),
        ("mi300x", "--memory GiB plans for any other"),
    ],
)
def test_a_name_that_means_no_gpu_or_two_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_gpu(name)


@pytest.mark.parametrize(
    ("device", "gib", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "h100"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 79.1, "a100-80gb"),
        ("NVIDIA L40S", 44.5, "l40s"),
        ("NVIDIA GeForce RTX 4090", 23.5, "rtx4090"),
        ("NVIDIA H200", 139.7, "h200"),
        ("NVIDIA H100 NVL", 93.0, None),
        ("Tesla V100", 31.7, None),
    ],
)
def test_a_driver_s_name_is_recognised(device: str, gib: float, slug: str | None) -> None:
    found = recognise(device, int(gib * GIB))
    assert (found.slug if found else None) == slug


def test_this_machine_is_the_device_that_the_engine_takes() -> None:
    gpu = Gpu(name="NVIDIA L40S", capability=(8, 9), memory_bytes=int(44.4 * GIB), free_bytes=40 * GIB)
    machine = Machine(
        cpu="x", cores=4, instructions=(), free_bytes=7, limit_bytes=None, torch="2", compiler=None, kernels=False,
        triton_lacks=None, device="cuda", dtype="bfloat16", gpus=(gpu,),
    )  # fmt: skip
    place = Place.here(machine)
    assert (place.slug, place.kind, place.free, place.multiplies_fp8) == ("l40s", "cuda", 40 * GIB, True)
    place = Place.here(msgspec.structs.replace(machine, device="cpu", dtype="float32"))
    assert (place.slug, place.kind, place.free, place.float_bytes) == ("cpu", "cpu", 7, 4)


# -- profiles ----------------------------------------------------------------------------------------------------------


def test_every_known_gpu_has_the_precisions_that_make_sense_on_it() -> None:
    for gpu in KNOWN_GPUS:
        found = profiles(Subject.of_entry(NEMO), Place.of_gpu(gpu), OPTIONS)
        fp8 = "fp8" if gpu.capability >= (8, 9) else "fp8-weight-only"
        names = [f"mistral-nemo-12b-instruct/{gpu.slug}-{name}-tp1" for name in ("bf16", fp8, "int8", "int4")]
        assert [each.id for each in found] == names


def test_every_id_that_is_listed_can_be_served(seen: Mapping[str, Weights]) -> None:
    subjects = [Subject.of_file("mine", seen["Q4_0"]), *map(Subject.of_entry, catalog.CATALOG.values())]
    places = [
        Place.of_size(80),
        Place(slug="cpu", name="a CPU", kind="cpu", free=2**34),
        *map(Place.of_gpu, KNOWN_GPUS),
    ]
    for options in (OPTIONS, msgspec.structs.replace(OPTIONS, kv_precision="fp8")):
        for subject, place in itertools.product(subjects, places):
            for each in profiles(subject, place, options):
                told = settings_of(each.id)
                assert (told["model"], told["precision"]) == (subject.name, each.precision)
                assert told["device"] == place.kind
                assert told["kv_precision"] == options.kv_precision


@pytest.mark.parametrize(
    ("model", "gpu", "taken"),
    [
        ("mistral-nemo-12b-instruct", "h100", "bf16"),
        ("mistral-nemo-12b-instruct-fp8", "h100", "fp8"),
        ("mistral-nemo-12b-instruct-fp8", "a100-40gb", "fp8-weight-only"),
    ],
)
def test_the_file_s_own_precision_is_taken(model: str, gpu: str, taken: str) -> None:
    found = profiles(Subject.of_entry(catalog.CATALOG[model]), Place.of_gpu(find_gpu(gpu)), OPTIONS)
    assert [each.id for each in found if each.taken] == [f"{model}/{gpu}-{taken}-tp1"]


def test_a_file_of_its_own_precision_comes_first_and_kv_precision_is_in_the_name(seen: Mapping[str, Weights]) -> None:
    options = msgspec.structs.replace(OPTIONS, kv_precision="fp8")
    found = profiles(Subject.of_file("mine", seen["Q4_0"]), Place.of_gpu(find_gpu("h100")), options)
    assert [each.id for each in found][:2] == ["mine/h100-stored-kvfp8-tp1", "mine/h100-bf16-kvfp8-tp1"]
    assert [each.taken for each in found] == [True, False, False, False, False]
    assert found[0].fit.plan.weights == seen["Q4_0"].nbytes["auto"]


# -- ranks -------------------------------------------------------------------------------------------------------------


def test_each_rank_has_its_part_of_weights_and_cache() -> None:
    whole, eighth = on("h100"), on("h100", tensor_parallel_size=8)
    norms = (2 * NEMO.shape.num_layers + 1) * NEMO.shape.hidden_size * 2
    assert eighth.plan.weights == (whole.plan.weights - norms) // 8 + norms
    assert eighth.plan.token_bytes == whole.plan.token_bytes // 8
    assert eighth.tokens > 10 * whole.tokens
    assert on("h100", tensor_parallel_size=16).plan.token_bytes == eighth.plan.token_bytes  # two ranks have one kv head


def test_what_is_too_large_for_one_gpu_fits_on_two() -> None:
    assert on("rtx4090").reason is not None
    assert on("rtx4090", tensor_parallel_size=2).reason is None


def test_a_model_that_cannot_be_divided_so_does_not_fit() -> None:
    reason = on("h100", tensor_parallel_size=7).reason
    assert reason is not None
    assert reason.startswith("tensor_parallel_size: 7 must divide the model's 32 attention heads")


@pytest.mark.parametrize("name", ["safetensors", "Q8_0"])
def test_a_file_is_looked_at_as_a_rank_reads_it(models: Mapping[str, Path], name: str) -> None:
    path = models[name]
    looked = look(path, "cpu", "bfloat16", ranks=2).weights
    assert looked is not None
    subject, place = Subject.of_file("mine", looked), Place(slug="cpu", name="a CPU", kind="cpu", free=2**34)
    found = fit(subject, place, msgspec.structs.replace(OPTIONS, tensor_parallel_size=2))
    assert (found.plan.free, found.reason) == (2**33, None)
    [first, _] = on_ranks(2, lambda each: load_rank(path, each, dtype=torch.bfloat16).weights.nbytes)
    assert found.plan.weights == pytest.approx(first, rel=0.01)
    undivided = probe("cpu", "bfloat16", str(path), ranks=3).weights
    assert undivided is not None
    assert undivided.refused.keys() == SCHEMES.keys()
    assert all(reason.startswith("tensor_parallel_size: 3 must divide") for reason in undivided.refused.values())


def test_profiles_carry_the_number_of_ranks() -> None:
    options = msgspec.structs.replace(OPTIONS, tensor_parallel_size=4)
    found = profiles(Subject.of_entry(NEMO), Place.of_gpu(find_gpu("h100")), options)
    assert [each.id.rpartition("-")[2] for each in found] == ["tp4"] * len(found)
    assert {settings_of(each.id)["tensor_parallel_size"] for each in found} == {"4"}
    table = profile_table(found)
    assert "Weights and KV cache of each of 4 ranks in GiB" in table
