"""The memory plan: what is known of the published models, and that it is what the engine allocates."""

from __future__ import annotations

import weakref
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.checkpoint import open_checkpoint
from engine.config import EngineConfig, ModelConfig
from engine.memory import (
    CUDA_CONTEXT,
    Device,
    matrices,
    parameter_count,
    plan_memory,
    token_bytes,
    weight_bytes,
)
from engine.model.cache import KVCache
from engine.model.decoder import Decoder
from engine.model.footprint import checkpoint_bytes
from engine.model.load import load_decoder
from engine.request import SamplingParams
from engine.runner import Runner
from engine.sampling.device import DeviceRows
from engine.schemes import SCHEMES, Kept
from engine.sizing import CacheSize, size_cache
from engine.step import RowInit, RowWork, StepPlan, Targets
from tests.compiled import compiled
from tests.fp8_models import write_fp8, write_mistral_fp8
from tests.tiny_models import MID, write_gguf, write_hf

CPU = torch.device("cpu")
NEMO = ModelConfig(
    architecture="MistralForCausalLM",
    vocab_size=131072,
    hidden_size=5120,
    num_layers=40,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    max_position_embeddings=1_024_000,
)
OPTIONS = EngineConfig(model_path="-")
FP8 = ("autofp8-static", "compressed-dynamic", "fp8-blocks")


def test_nemo_has_12_247_782_400_parameters() -> None:
    assert parameter_count(NEMO) == 12_247_782_400


@pytest.mark.parametrize(
    ("precision", "billion_bytes"),
    [("bf16", 24.4956), ("fp8", 13.5976), ("fp8-weight-only", 13.5976), ("int8", 12.6309), ("int4", 9.0487)],
)
def test_weights_of_nemo_take_what_each_precision_promises(precision: str, billion_bytes: float) -> None:
    assert weight_bytes(NEMO, SCHEMES[precision], 2) / 1e9 == pytest.approx(billion_bytes, abs=5e-5)


def test_a_token_of_nemo_takes_160_kib_of_cache_and_half_of_it_in_fp8() -> None:
    assert token_bytes(NEMO, "auto", 2) == 160 * 1024
    assert token_bytes(NEMO, "fp8", 2) == 82.5 * 1024  # 80 KiB of codes; a float32 scale per head, of 128 codes


@pytest.mark.parametrize(
    ("gpu_gib", "precision", "kv", "thousand_tokens"),
    # 8 % of reserve and 0.2 GiB of workspace, worked out by hand, leave so many.
    [(80, "fp8", "auto", 390), (80, "bf16", "auto", 323), (40, "fp8", "auto", 148), (141, "fp8", "auto", 745)],
)
def test_what_fits_a_gpu_is_near_the_sum_by_hand(gpu_gib: int, precision: str, kv: str, thousand_tokens: int) -> None:
    options = msgspec.structs.replace(OPTIONS, precision=precision, kv_precision=kv)
    plan = plan_memory(NEMO, options, Device(kind="cuda", free=gpu_gib * 2**30 - CUDA_CONTEXT))
    assert plan.tokens / 1000 == pytest.approx(thousand_tokens, rel=0.08)


def test_the_parts_of_a_plan_are_the_free_memory() -> None:
    for free in (10**9, 2 * 10**10, 10**11):
        plan = plan_memory(NEMO, OPTIONS, Device(kind="cuda", free=free))
        parts = plan.weights + plan.tables + plan.workspace + plan.reserve + plan.cache - plan.missing
        assert parts == plan.free == free
        assert (plan.cache == 0) != (plan.missing == 0)


GGUF_KINDS = ("Q8_0", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K")


def write_forms(folder: Path) -> dict[str, Path]:
    """The same model as floats, in FP8 with scales per tensor, per row and per block, and as GGUF blocks."""
    return {
        "safetensors": write_hf(folder / "hf", **MID),
        **{kind: write_fp8(folder / kind, kind, **MID).folder for kind in FP8},
        "mistral-fp8": write_mistral_fp8(folder / "mistral", static=True, **MID).folder,
        **{kind: write_gguf(folder / f"{kind}.gguf", kind=kind, **MID) for kind in GGUF_KINDS},
    }


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_forms(tmp_path_factory.mktemp("forms"))


@pytest.mark.parametrize("with_kernels", [True, False])
@pytest.mark.parametrize("precision", list(SCHEMES))
@pytest.mark.parametrize("form", ["safetensors", *FP8, "mistral-fp8", *GGUF_KINDS])
def test_the_plan_is_what_loading_allocates(
    forms: dict[str, Path], form: str, precision: str, with_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_kernels:
        monkeypatch.setattr("engine.model.load.load_kernels", lambda threads: None)
    scheme, dtype = SCHEMES[precision], torch.bfloat16
    with torch.inference_mode(), open_checkpoint(str(forms[form])) as checkpoint:
        planned = checkpoint_bytes(checkpoint, scheme, dtype)
        decoder = load_decoder(checkpoint, dtype, CPU, 512, 1, lambda phase, done: None, scheme)
    norms = (2 * MID["num_hidden_layers"] + 1) * MID["hidden_size"] * 2
    assert planned == decoder.weights.nbytes + norms
    if form == "safetensors" and precision != "auto":
        assert planned == weight_bytes(decoder.config, scheme, 2)


def test_the_matrices_are_those_of_a_checkpoint(forms: dict[str, Path]) -> None:
    with open_checkpoint(str(forms["safetensors"])) as checkpoint:
        for name, outputs, inputs in matrices(checkpoint.config):
            assert checkpoint.matrix(name).shape == (outputs, inputs)
        assert parameter_count(checkpoint.config) == checkpoint.num_parameters


class Tally(TorchDispatchMode):
    """Counts the bytes of all tensors that come and go; `peak` is the most that were alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        given = {each.untyped_storage()._cdata for each in tensors if each.layout is torch.strided}
        for tensor in tree_leaves(made):
            if not isinstance(tensor, torch.Tensor) or (storage := tensor.untyped_storage())._cdata in given:
                continue  # what was written into was there before: the KV cache
            if storage._cdata not in self._alive:
                self._alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self._alive.values()))
        return made


def stepping(batch: int, tokens: int, context: int, precision: str, kv: str) -> EngineConfig:
    """Of an engine whose steps are weighed."""
    return msgspec.structs.replace(
        OPTIONS,
        max_batch_size=batch,
        max_batch_tokens=tokens,
        max_model_len=context,
        precision=precision,
        kv_precision=kv,
        threads=1,
        seed=0,
    )


def decoder_in(path: Path, precision: str, context: int) -> Decoder:
    with torch.inference_mode(), open_checkpoint(str(path)) as checkpoint:
        return load_decoder(checkpoint, torch.bfloat16, CPU, context, 1, lambda phase, done: None, SCHEMES[precision])


def peak_of_a_step(runner: Runner, work: list[RowWork], sampling: SamplingParams) -> int:
    rows = [item.row for item in work]
    plan = StepPlan(work=work, admitted=[RowInit(row, sampling, 0, [0], []) for row in rows])
    with Tally() as tally:
        runner.run(plan)
    runner.run(StepPlan(work=[], released=rows))
    return tally.peak


@pytest.mark.parametrize(("batch", "tokens"), [(1, 2048), (32, 64)], ids=["prefill", "draw"])
def test_a_step_takes_no_more_than_the_workspace_and_not_much_less(
    forms: dict[str, Path], batch: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One operator after the other: what all layers in one call take is the same, but not from torch."""
    compiled(1)
    monkeypatch.setattr("engine.model.load.fuse", lambda *arguments: None)
    options = msgspec.structs.replace(
        OPTIONS, max_batch_size=batch, max_batch_tokens=tokens, max_model_len=2048, threads=1, seed=0
    )
    decoder = decoder_in(forms["safetensors"], "auto", 2048)
    planned = plan_memory(decoder.config, options, Device(kind="cpu", free=10**10)).workspace
    runner = Runner(options, decoder, CacheSize(max(batch, 32), 2048, 32))
    prefill = [RowWork(row=0, start=0, token_ids=[1] * tokens, new_pages=list(range(tokens // 64)), sample=True)]
    draws = [RowWork(row=row, start=0, token_ids=[1], new_pages=[row], sample=True) for row in range(batch)]
    wide = SamplingParams(temperature=5.0, top_p=0.99999)  # the cut lies beyond the likeliest 4,095
    peak = max(peak_of_a_step(runner, work, wide) for work in (prefill, draws))
    assert 0.8 * planned < peak <= planned


@pytest.mark.parametrize(
    ("precision", "tokens", "kv", "slab"),
    [
        ("bf16", 2048, "auto", 2**26),  # scores: ten times what all else takes, whatever the precision
        *(
            (precision, *sizes)
            for precision in ("bf16", "int4", "int8", "fp8", "fp8-weight-only")
            for sizes in ((2048, "auto", 2**20), (64, "auto", 2**17), (64, "fp8", 2**26))
        ),
    ],
)
def test_in_plain_torch_too(
    forms: dict[str, Path], precision: str, tokens: int, kv: str, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: a prompt's last chunk, the whole context behind it, whatever its pages hold."""
    monkeypatch.setattr("engine.model.load.load_kernels", lambda threads: None)
    for module in ("engine.memory", "engine.ops.reference"):
        monkeypatch.setattr(f"{module}.SCORE_SLAB", slab)
    context = 4096
    options = stepping(1, tokens, context, precision, kv)
    decoder = decoder_in(forms["safetensors"], precision, context)
    planned = plan_memory(decoder.config, options, Device(kind="cpu", free=10**10, plain=True)).workspace
    runner = Runner(options, decoder, CacheSize(64, context, 64))
    last = RowWork(row=0, start=context - tokens, token_ids=[1] * tokens, new_pages=list(range(64)), sample=True)
    plan = StepPlan(work=[last], admitted=[RowInit(0, SamplingParams(), 0, [0], [])])
    with Tally() as tally:
        runner.run(plan)
    assert 0.7 * planned < tally.peak <= planned


@pytest.fixture
def unlaunched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are built for Triton, on a CPU. Its launchers take the memory that they would take, and launch nothing."""
    jit = pytest.importorskip("triton.runtime.jit")
    from engine.ops.triton import TritonOps
    from engine.ops.triton.linear import TritonProducts
    from engine.ops.triton.sampler import choose

    def first_token(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(each.zero_() for each in choose(*arguments))  # else what is chosen would be any bits

    monkeypatch.setattr(jit.JITFunction, "run", lambda *arguments, **options: None)
    monkeypatch.setattr("engine.model.load.load_kernels", lambda threads: None)
    monkeypatch.setattr("engine.model.load.select_ops", lambda kernels, device: TritonOps((9, 0)))
    monkeypatch.setattr("engine.model.load.find_products", lambda device: TritonProducts(CPU, 132, decodes=True))
    monkeypatch.setattr("engine.sampler.find_device_rows", lambda rows, device: DeviceRows(rows, device, first_token))


@pytest.mark.usefixtures("unlaunched")
@pytest.mark.parametrize(
    ("batch", "tokens", "context", "kv", "slab", "workspace"),
    [
        pytest.param(1, 2048, 2048, "auto", 2**16, 2**20, id="MLP"),
        pytest.param(1, 512, 4096, "auto", 2**16, 2**23, id="parts of attention"),
        pytest.param(5, 16, 4096, "fp8", 2**16, 2**19, id="parts, few tokens"),
        pytest.param(1, 1024, 1024, "fp8", 2**26, 2**20, id="logprobs of a prompt"),
        pytest.param(48, 64, 256, "auto", 2**16, 2**20, id="choice and logprobs"),
    ],
)
@pytest.mark.parametrize("precision", ["bf16", "int4", "fp8"])
def test_with_triton_too(
    forms: dict[str, Path],
    batch: int,
    tokens: int,
    context: int,
    kv: str,
    slab: int,
    workspace: int,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A prompt's last chunk, the whole context behind it and logprobs of all its tokens; the choice of all rows.

    What an operator of torch takes inside and gives back is not counted: of logsumexp 4 bytes per logit, which of a
    prompt's logprobs are 4 of 9.
    """
    for module in ("engine.memory", "engine.ops.triton.attention", "engine.ops.triton.linear"):
        monkeypatch.setattr(import_module(module), "WORKSPACE", workspace)
    monkeypatch.setattr("engine.memory.PLAIN_PAGES", workspace)
    for module in ("engine.memory", "engine.quant.coded"):
        monkeypatch.setattr(f"{module}.DECODE_SLAB", workspace // 2)
    for module in ("engine.memory", "engine.sampling.prompt"):
        monkeypatch.setattr(f"{module}.LOGITS_SLAB", slab)
    options = stepping(batch, tokens, context, precision, kv)
    decoder = decoder_in(forms["safetensors"], precision, context)
    planned = plan_memory(decoder.config, options, Device(kind="cuda", free=10**10)).workspace
    pages = context // 64
    runner = Runner(options, decoder, CacheSize(batch * pages, context, pages))
    asked = Targets(context - tokens + 1, [1] * (tokens - 1), 5)
    prefill = RowWork(0, context - tokens, [1] * tokens, list(range(pages)), sample=True, targets=asked)
    decode = [
        RowWork(row, context - 1, [1], list(range(row * pages, (row + 1) * pages)), sample=True) for row in range(batch)
    ]
    wide = SamplingParams(temperature=5.0, top_p=0.99999, logprobs=5)
    peaks = [peak_of_a_step(runner, work, wide) for work in ([prefill], decode)]
    widened = 2 * batch * decoder.config.vocab_size if SCHEMES[precision].head is not Kept.FLOAT else 0
    assert 0.6 * planned < max(peaks) <= planned + widened  # only CUDA multiplies bfloat16 into float32


@pytest.mark.parametrize(("kv", "dtype"), [("auto", torch.bfloat16), ("fp8", torch.float8_e4m3fn)])
def test_the_cache_is_the_pages_of_the_plan(kv: str, dtype: torch.dtype) -> None:
    model = msgspec.structs.replace(NEMO, num_layers=2)
    options = msgspec.structs.replace(OPTIONS, kv_precision=kv)
    plan = plan_memory(model, options, Device(kind="cpu", free=5 * 10**9))
    size = size_cache(options, model, plan, "cpu")
    cache = KVCache.allocate(model, size.num_pages, plan.page_size, dtype, CPU)
    taken = sum(layer.nbytes for layer in cache.layers)
    assert taken == size.num_pages * plan.page_size * plan.token_bytes


@pytest.mark.parametrize("kv", ["auto", "fp8"])
def test_an_engine_holds_what_was_planned(forms: dict[str, Path], kv: str) -> None:
    """Loaded by its front door, with room for exactly so many tokens."""
    options = EngineConfig(
        model_path=str(forms["Q8_0"]),
        dtype="bfloat16",
        kv_precision=kv,
        device="cpu",
        threads=1,
        kv_memory_bytes=5 * 2**20,
    )
    runner = Runner.load(options, lambda phase, done: None)
    with open_checkpoint(options.model_path) as checkpoint:
        weights, token = (
            checkpoint_bytes(checkpoint, SCHEMES["auto"], torch.bfloat16),
            token_bytes(checkpoint.config, kv, 2),
        )
    assert runner.info.weight_bytes == pytest.approx(weights, rel=0.02)
    assert runner.info.kv_pages == 5 * 2**20 // (64 * token)
