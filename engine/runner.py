"""Runs steps on the device: StepPlan in, StepResult out. Owns weights, KV cache, rows and sampler; decides nothing.

    plan ──► rows (block tables) ──► batch tensors ──► decoder ──► logits of the rows that sample ──► sampler ──► result

It trusts the plan: a page has one row that writes into it and any number that read it, positions of a row are
contiguous, nothing exceeds `info`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from engine.checkpoint import open_checkpoint
from engine.config import EngineConfig, ModelConfig
from engine.face import Done, LoadProgress
from engine.graphs import CudaRecord, Graphs, Record, sizes
from engine.machine import choose_device, choose_dtype, free_memory, usable_cores
from engine.memory import Device, parameter_count, plan_memory
from engine.model.cache import KVCache
from engine.model.decoder import Decoder, Layer
from engine.model.footprint import checkpoint_bytes
from engine.model.load import load_decoder
from engine.model.lora import LoraPool
from engine.ops import has_kernels
from engine.parallel.checkpoint import RankCheckpoint
from engine.parallel.communicator import Communicator
from engine.parallel.layers import join_ranks
from engine.request import EngineInfo, SamplingParams
from engine.rows import Batch, Rows
from engine.sampler import Sampled, Sampler
from engine.sampling.prompt import TargetScores, score_targets
from engine.schemes import SCHEMES
from engine.sizing import CacheSize, check_config, size_cache
from engine.speculate import standing
from engine.step import Masks, RowInit, RowWork, StepPlan, StepResult

CPU_WARM_UP_TOKENS = 32  # more than the row counts that kernels treat as few
GPU_WARM_UP_ROWS = (1, 2, 4, 16, 32, 64)  # up to each of them a matrix product has a kernel of its own, and beyond them
GPU_WARM_UP_QUERIES = (1, 2, 16, 256)  # of a sequence: a decode, drafts, and chunks, as attention tells them apart
READ_SHARE = 0.8  # of the time to load; the rest is one step of each kind


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on its way. It owns all that its result is made of: rows may have changed hands when that is asked for."""

    work: list[RowWork]
    model_seconds: float = 0.0
    sampled: Sampled | None = None
    targets: TargetScores | None = None

    def result(self) -> StepResult:
        """Waits until the device has done the step."""
        sampled = [] if self.sampled is None else standing(self.work, self.sampled.result())
        targets = {} if self.targets is None else self.targets.result()
        return StepResult(sampled, targets, self.model_seconds)


class Runner:
    """One loaded model on one device. All methods belong to one thread."""

    def __init__(
        self,
        config: EngineConfig,
        decoder: Decoder,
        size: CacheSize,
        load_seconds: float = 0.0,
        whole: ModelConfig | None = None,
        communicator: Communicator | None = None,
        record: Record | None = None,
    ) -> None:
        """Use `load`; this is for a decoder that is there already.

        Args:
            size: pages to allocate and the context length that they serve.
            whole: the model that `decoder` is one rank's share of; None = it is all of it.
            communicator: to the ranks that have the others.
            record: how steps are recorded once and replayed from then on; None = as the device does, if it does.
        """
        device, dtype, model = decoder.device, decoder.dtype, decoder.config
        batch = config.batch_on(device.type)
        self._decoder = decoder
        # Every rank samples for itself, from the same logits. But a draw on a GPU may differ in its last bit; where the
        # device goes on with a token that no plan has brought, it must be rank 0's.
        self._from_first = communicator.from_first if communicator and config.lookahead_on(device.type) else None
        self._device = device
        kv_dtype = torch.float8_e4m3fn if config.kv_precision == "fp8" else dtype
        self._cache = KVCache.allocate(model, size.num_pages, config.page_size, kv_dtype, device)
        loras = config.max_loras, config.max_lora_rank
        lora_dtype = torch.float32 if device.type == "cpu" else dtype
        self.adapters = LoraPool(model, *loras, lora_dtype, device) if config.max_loras else None
        record = record or _find_record(config, decoder)
        self._graphs = None
        if record is not None:
            recorded = sizes(*batch, config.max_draft_tokens, size.max_model_len)
            self._graphs = Graphs(decoder, self._cache, recorded, size.pages_per_sequence, record)
        self._rows = Rows(batch.size, size.pages_per_sequence, config.page_size, device)
        whole = whole or model
        # A file may name tokens that its embedding has not. They never come, and nothing may look for their logits.
        self.eos_token_ids = tuple(token for token in whole.eos_token_ids if 0 <= token < whole.vocab_size)
        self._sampler = Sampler(whole.vocab_size, batch.size, device, self.eos_token_ids)
        self.info = EngineInfo(
            vocab_size=whole.vocab_size,
            max_model_len=size.max_model_len,
            max_batch_size=batch.size,
            max_batch_tokens=batch.tokens,
            page_size=config.page_size,
            kv_pages=size.num_pages,
            dtype=str(dtype).removeprefix("torch."),
            device=device.type,
            architecture=model.architecture,
            num_parameters=parameter_count(whole),
            weight_bytes=decoder.weights.nbytes,
            load_seconds=load_seconds,
            max_loras=config.max_loras,
            device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else "",
            device_bytes=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0,
        )

    @classmethod
    def load(cls, config: EngineConfig, progress: LoadProgress, communicator: Communicator | None = None) -> Runner:
        """Read the checkpoint, choose device, dtype and sizes, allocate everything that will ever be needed.

        Args:
            communicator: to the other ranks that share the model; None = there are none.

        Raises:
            CheckpointError: the model file is missing, broken or of a kind that we do not run.
            EngineConfigError: these settings cannot work with this model on this machine.
        """
        began = time.monotonic()
        check_config(config)
        ranks = 1 if communicator is None else communicator.size
        device = choose_device(config.device) if communicator is None else communicator.device
        dtype = choose_dtype(config.dtype, device)
        threads = max(1, (config.threads or usable_cores()) // ranks)
        scheme = SCHEMES[config.precision]
        torch.set_num_threads(threads)
        with torch.inference_mode(), open_checkpoint(config.model_path) as checkpoint:
            source = checkpoint if communicator is None else RankCheckpoint(checkpoint, communicator.rank, ranks)
            model: ModelConfig = source.config
            # Sized before the weights are read, so that what cannot fit fails in a second and not in minutes.
            weights = checkpoint_bytes(source, scheme, dtype)
            plain = not has_kernels(device, threads)
            free = free_memory(device) // (ranks if device.type == "cpu" else 1)  # which ranks on a CPU share
            on = Device(kind=device.type, free=free, float_bytes=dtype.itemsize, plain=plain)
            size = size_cache(config, model, plan_memory(model, config, on, weights), device.type)
            join = None
            if communicator is not None:
                size = CacheSize(*communicator.least(astuple(size)))  # a page has its part on every rank
                join = partial(join_ranks, checkpoint.config.vocab_size, communicator)
            decoder = load_decoder(source, dtype, device, size.max_model_len, threads, progress, scheme, join)
            return cls(config, decoder, size, time.monotonic() - began, checkpoint.config, communicator)

    def close(self) -> None:
        """There is nothing that does not end with it."""

    @torch.inference_mode()
    def launch(self, plan: StepPlan, masks: Masks | None = None) -> Launched:
        """Begin one step: free and take rows, compute all work, sample where the plan says so.

        Nothing here waits for a GPU, which works through the steps in the order of their launches; but to fill a slot
        with an adapter, whose memory is not pinned, and, where rows have grammars, for the step before. A CPU has done
        the step when this returns.

        Args:
            masks: asked for when the logits are on their way.
        """
        for row in plan.released:
            self._sampler.clear_row(row)
        if self.adapters is not None:
            for fill in plan.fills:
                self.adapters.fill(fill.slot, fill.adapter)
        for init in plan.admitted:
            self._rows.clear(init.row, init.adapter)
            self._sampler.set_row(init)
        if not plan.work:
            return Launched([])
        work, segments = self._rows.by_adapter(plan.work)
        batch = self._rows.batch(work)
        layers = None
        if self.adapters is not None and segments:
            layers = self.adapters.around(self._decoder.weights.layers, segments)
        began = time.perf_counter()
        hidden = self._forward(batch, layers)
        model_seconds = time.perf_counter() - began
        head = partial(self._decoder.logits, hidden)
        starts = batch.attention.query_starts_list[:-1]
        targets = score_targets(work, starts, head, self.info.vocab_size, self._device)

        if not batch.choices:
            return Launched(work, model_seconds, None, targets)
        began = time.perf_counter()
        logits = head(batch.sampled)
        model_seconds += time.perf_counter() - began
        rows, positions = zip(*batch.choices, strict=True)
        sampled = self._sampler.sample(logits, [*rows], [*positions], None if masks is None else masks())
        tokens = sampled.token_ids if self._from_first is None else self._from_first(sampled.token_ids)
        self._rows.keep_sampled(batch.sampled_rows, tokens)
        return Launched(work, model_seconds, sampled, targets)

    def _forward(self, batch: Batch, layers: Sequence[Layer] | None) -> Tensor:
        """Hidden states of a step, which the next one may overwrite; recorded steps know of no adapters."""
        if self._graphs is not None and layers is None:
            hidden = self._graphs.forward(batch.token_ids, batch.attention)
            if hidden is not None:
                return hidden
        return self._decoder.forward(batch.token_ids, batch.attention, self._cache, layers)

    def run(self, plan: StepPlan) -> StepResult:
        """Launch one step and wait for its result."""
        return self.launch(plan).result()

    def warm_up(self) -> None:
        """All steps that can be recorded, a prefill and the largest decode: no request pays for first uses.

        On a GPU it is the largest prefill, whose memory must be there before a request needs it; recording comes first,
        because it gives back what the allocator holds. And it is a step of each kind, since Triton compiles a kernel
        for seconds where it is launched for the first time. On a CPU the largest prefill would be a minute of a 12 B
        model's arithmetic, with nothing to learn from it. Before the first request only: it writes into pages and
        leaves all rows free.
        """
        if self._graphs is not None:
            self._graphs.record()
        info = self.info
        rows = min(info.max_batch_size, info.kv_pages)
        tokens = min(info.max_batch_tokens, info.max_model_len)
        for step in warm_up_steps(info.device, rows, tokens, info.max_model_len):
            pages = list(range(-(-(step.start + step.tokens) // info.page_size)))
            work = [RowWork(0, step.start, [0] * step.tokens, pages, sample=True)]
            work += [RowWork(row, 0, [0], [row], sample=True) for row in range(1, step.rows)]
            self.run(StepPlan(work, admitted=[greedy_row(row) for row in range(step.rows)]))
            self.run(StepPlan(work=[], released=list(range(step.rows))))


class WarmUpStep(NamedTuple):
    """The first of `rows` computes `tokens` tokens from position `start` on, the others one token each."""

    rows: int
    start: int
    tokens: int


def warm_up_steps(device: str, rows: int, tokens: int, context: int) -> list[WarmUpStep]:
    """What `Runner.warm_up` runs, with pages that may hold anything: nobody looks at the tokens.

    Args:
        device: "cpu" or "cuda".
        rows, tokens: the most of a step.
        context: the longest of a row, `tokens` or more.
    """
    steps = [WarmUpStep(1, 0, min(tokens, CPU_WARM_UP_TOKENS) if device == "cpu" else tokens)]
    if device == "cuda":
        counts = [count for count in GPU_WARM_UP_ROWS if count <= tokens]
        steps += [WarmUpStep(1, 0, count) for count in counts]  # prompts
        steps += [WarmUpStep(1, context - count, count) for count in GPU_WARM_UP_QUERIES if count <= tokens]  # in parts
        beside = min(tokens - 1, GPU_WARM_UP_QUERIES[-1])  # a prompt, beside a decode
        steps += [WarmUpStep(2, 0, beside)] if rows > 1 else []
        steps += [WarmUpStep(count, 0, 1) for count in GPU_WARM_UP_ROWS if count < rows]
    return [*steps, WarmUpStep(rows, 0, 1)]


def load_runner(
    config: EngineConfig,
    progress: LoadProgress,
    communicator: Communicator | None = None,
    meet: Callable[[], None] = lambda: None,
) -> Runner:
    """A runner that is loaded and warm, as the core wants it. Raises what `Runner.load` raises.

    Reading counts as READ_SHARE of the whole, so that progress never goes back.

    Args:
        meet: waits, before the first step, for the other ranks to have loaded.
    """
    done = Done(0.0)

    def reading(phase: str, read: Done) -> None:
        nonlocal done
        done = read._replace(fraction=read.fraction * READ_SHARE)
        progress(phase, done)

    runner = Runner.load(config, reading, communicator)
    meet()
    progress("warm up", done)
    runner.warm_up()
    progress("warm up", done._replace(fraction=1.0))
    return runner


def _find_record(config: EngineConfig, decoder: Decoder) -> Record | None:
    """CUDA graphs, where operators take no number from the host, and no other rank has to record at the same time."""
    if not config.cuda_graphs or decoder.device.type != "cuda" or config.tensor_parallel_size > 1:
        return None
    return CudaRecord(decoder.device) if decoder.replayable else None


def greedy_row(row: int) -> RowInit:
    """A row as steps that only take time have it."""
    return RowInit(row, SamplingParams(temperature=0.0), seed=0, prompt_token_ids=[0], output_token_ids=[])
