"""What engine figures are of: a decoder of random weights, and the sizes that its runners have."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import msgspec
import torch

from bench.gpu.roofline import Arithmetic
from bench.gpu.weights import RandomCheckpoint
from bench.gpu.workload import Workload
from engine.config import EngineConfig
from engine.face import Done
from engine.machine import choose_dtype, free_memory, usable_cores
from engine.memory import Device, plan_memory
from engine.model.cache import KVCache
from engine.model.decoder import Decoder
from engine.model.load import load_decoder
from engine.ops import has_kernels
from engine.schemes import SCHEMES
from engine.sizing import CacheSize, check_config, size_cache

KV_PRECISION = {"bf16": "auto", "fp8": "fp8", "int4": "fp8"}


@dataclass(frozen=True, slots=True)
class Subject:
    """A decoder with its sizes, of which runners are made."""

    config: EngineConfig
    decoder: Decoder
    size: CacheSize
    arithmetic: Arithmetic


@torch.inference_mode()
def build(work: Workload, precision: str, device: torch.device) -> Subject:
    """As `Runner.load` does it, with weights that come from no file."""
    config = EngineConfig(
        model_path="random weights",
        device=device.type,
        precision=precision,
        kv_precision=KV_PRECISION[precision],
        max_batch_size=work.batches[-1],
        max_batch_tokens=max(work.max_batch_tokens, work.batches[-1]),
        max_draft_tokens=0,  # greedy text of random weights repeats itself: drafts would flatter
        seed=0,
    )
    check_config(config)
    dtype, scheme, threads = choose_dtype("auto", device), SCHEMES[precision], usable_cores()
    torch.set_num_threads(threads)
    plain = not has_kernels(device, threads)
    on = Device(kind=device.type, free=free_memory(device), float_bytes=dtype.itemsize, plain=plain)
    size = size_cache(config, work.model, plan_memory(work.model, config, on), device.type)
    source = RandomCheckpoint(work.model, scheme, dtype, device)
    decoder = load_decoder(source, dtype, device, size.max_model_len, threads, _silent, scheme)
    return Subject(config, decoder, size, Arithmetic(work.model, scheme, config.kv_precision, dtype.itemsize))


def _silent(phase: str, done: Done) -> None:
    """Nobody watches."""


def modes(config: EngineConfig) -> dict[str, EngineConfig]:
    """By name: each kernel launched by the host, and on a GPU also steps that were captured."""
    eager = msgspec.structs.replace(config, cuda_graphs=False)
    if config.device != "cuda":
        return {"eager": eager}
    return {"eager": eager, "graphs": msgspec.structs.replace(config, cuda_graphs=True)}


@torch.inference_mode()
def fill(cache: KVCache) -> None:
    """Random numbers for keys and values; of codes all but NaN (0x7F, which the mask makes 0x77)."""
    for layer in cache.layers:
        for pages in (layer.keys, layer.values):
            if pages.dtype == torch.float8_e4m3fn:
                pages.view(torch.uint8).random_(0, 256).bitwise_and_(0xF7)
            else:
                pages.normal_()
        for scales in (layer.key_scales, layer.value_scales):
            if scales is not None:
                scales.fill_(0.01)


def release(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
