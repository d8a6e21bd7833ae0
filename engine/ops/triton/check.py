"""Compiles the kernels for cards that are not there: `python -m engine.ops.triton.check [--quick]`.

The launchers run as a server would run them, with their own tables, but each launch compiles its kernel for the card in
question and goes no further. So what fails on that card fails here: what Triton or ptxas refuse, shared memory that a
multiprocessor has not, registers that spill.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from engine.limits import PLAIN_PAGES_FROM
from engine.ops.interface import AttentionBatch, CodedWeight, LayerCache, Quantised, Rounding
from engine.ops.triton import TritonOps
from engine.ops.triton.linear import TritonProducts
from engine.ops.triton.sampler import PARAMETERS, choose

# KiB of shared memory that a program may have: CUDA C++ Programming Guide, technical specifications.
SHARED_KIB = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (12, 0): 99}
SPILL_BYTES = 64  # in the stack of a thread: a few registers once are nothing, a tile that has no room is hundreds

Capability = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel for one card. `spilled` bytes of a thread's registers are in memory."""

    name: str
    capability: Capability
    warps: int
    stages: int
    shared: int
    registers: int
    spilled: int
    seconds: float

    @property
    def fault(self) -> str | None:
        """Why it must not be used."""
        limit = SHARED_KIB[self.capability] * 1024
        if self.shared > limit:
            return f"{self.shared} bytes of shared memory are more than {limit}"
        if self.spilled > SPILL_BYTES:
            return f"{self.spilled} bytes of registers spill, more than {SPILL_BYTES}"
        return None

    def __str__(self) -> str:
        return (
            f"sm_{self.capability[0]}{self.capability[1]} {self.name:18} warps {self.warps}  stages {self.stages}  "
            f"shared {self.shared / 1024:5.1f} KiB  registers {self.registers:3}  spilled {self.spilled:3}  "
            f"{self.seconds:4.1f} s  {self.fault or 'ok'}"
        )


@dataclass(frozen=True, slots=True)
class _Card:
    """What Triton asks a driver for before it compiles."""

    capability: Capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability[0] * 10 + self.capability[1], 32)

    def get_current_device(self) -> int:
        """Kernels are kept by device: each card has a number of its own."""
        return self.capability[0] * 10 + self.capability[1]

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(capability: Capability, done: Callable[[Compiled], None]) -> Iterator[None]:
    """Within it, a launch compiles its kernel for that card, tells of it where it is new, and runs nothing."""
    launch, card = JITFunction.run, driver._active

    def compile_only(kernel: JITFunction[Any], *args: Any, **options: Any) -> Any:
        began, log = time.monotonic(), io.StringIO()
        with redirect_stdout(log):
            found = launch(kernel, *args, **(options | {"warmup": True}))
        if said := re.search(r"Used (\d+) registers", log.getvalue()):
            spilled = re.search(r"(\d+) bytes spill stores", log.getvalue())
            of = found.metadata
            size, spill = int(said[1]), int(spilled[1]) if spilled else 0
            seconds = time.monotonic() - began
            done(Compiled(of.name, capability, of.num_warps, of.num_stages, of.shared, size, spill, seconds))
        return found

    with knobs.nvidia.scope(), knobs.compilation.scope():
        knobs.nvidia.dump_ptxas_log = True  # only there does it say what spills
        knobs.compilation.always_compile = True  # what lies in the cache has no log
        driver.set_active(_Card(capability))
        JITFunction.run = compile_only
        try:
            yield
        finally:
            JITFunction.run = launch
            driver.set_active(card)


@dataclass(frozen=True, slots=True)
class Model:
    """What decides about kernels, with NeMo's numbers."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    fp8: bool = False
    window: int | None = None
    page_size: int = 64


MODELS = [
    Model(),
    Model(fp8=True),
    Model(window=4096),
    Model(heads=15, kv_heads=5, head_dim=64, fp8=True, page_size=16),
    Model(heads=32, kv_heads=32, head_dim=96),
    Model(heads=16, kv_heads=8, head_dim=256),
    Model(heads=16, kv_heads=8, head_dim=256, fp8=True),
    Model(dtype=torch.float32),
]
QUICK = [((9, 0), Model()), ((8, 0), Model(fp8=True))]


def attention_kernels(ops: TritonOps, model: Model) -> None:
    """Decode of few and of many sequences, drafts, prefill with and without a cut context."""
    page = (8, model.kv_heads, model.page_size)
    numbers = torch.empty(*page, model.head_dim, dtype=torch.float8_e4m3fn if model.fp8 else model.dtype)
    scales = torch.empty(page) if model.fp8 else None
    cache = LayerCache(numbers, numbers, scales, scales)
    table = torch.empty(1, model.head_dim)
    for sequences, queries, context in [(1, 1, 8192), (256, 1, 1024), (1, 8, 8192), (1, 4096, 4096), (1, 256, 8192)]:
        tokens = sequences * queries
        batch = AttentionBatch(
            positions=torch.zeros(tokens, dtype=torch.int64),
            slots=torch.zeros(tokens, dtype=torch.int64),
            query_starts=torch.zeros(sequences + 1, dtype=torch.int32),
            context_lens=torch.zeros(sequences, dtype=torch.int32),
            block_tables=torch.zeros(sequences, context // model.page_size, dtype=torch.int32),
            max_query_len=queries,
            max_context_len=context,
            query_starts_list=[],
            context_lens_list=[],
        )
        qkv = torch.empty(tokens, (model.heads + 2 * model.kv_heads) * model.head_dim, dtype=model.dtype)
        query = ops.rope_and_write(qkv, table, cache, batch)
        ops.attention(query, cache, batch, model.window)
        if model.fp8 and queries >= PLAIN_PAGES_FROM:  # which a look at the batch's lists decides
            ops.attention(query, cache, replace(batch, query_starts_list=[0, tokens], context_lens_list=[tokens]), None)


# Bits (0 = e4m3) and group of weights: our own formats, those of GGUF, blocks of FP8.
WEIGHTS = [(0, 0), (0, 128), (4, 32), (5, 32), (6, 16), (6, 64), (8, 64)]


def other_kernels(capability: Capability) -> None:
    """Norm, SwiGLU, products of few and of many rows with NeMo's weights, and the sampler."""
    device, inputs, outputs = torch.device("cpu"), 5120, 6144
    products = TritonProducts(device, 132, capability >= (8, 9))
    for bits, group in WEIGHTS:
        scales = torch.empty(
            inputs // group if group else 1, outputs, dtype=torch.float16 if 0 < group <= 64 else torch.float32
        )
        if bits == 0:
            codes = torch.empty(outputs, inputs, dtype=torch.float8_e4m3fn)
        else:
            codes = torch.empty(inputs if bits == 8 else inputs // 2, outputs, dtype=torch.uint8)
        high = torch.empty(inputs * (bits - 4) // 8, outputs, dtype=torch.uint8) if bits in (5, 6) else None
        mins = scales if bits in (4, 5) else None
        weight = CodedWeight(codes, high, scales, mins, bits, group, outputs, inputs)
        for rows in (1, 2, 4, 16, 32, 64):
            if rows <= products.most_rows(weight):
                x = torch.empty(rows, inputs, dtype=torch.bfloat16)
                products.multiply(x, weight, None, wide=False)
                if bits == 0:
                    codes = x.to(torch.float8_e4m3fn)
                    products.multiply(Quantised(codes, torch.empty(rows), x.dtype), weight, None, False)
        products.decode(weight, 0, outputs, torch.bfloat16)
    x, residual, ops = torch.empty(1, inputs, dtype=torch.bfloat16), torch.empty(1, inputs), TritonOps(capability)
    for rounding in (None, Rounding(None), Rounding(0.1)):
        ops.add_rms_norm(x, residual, x[0], 1e-5, rounding)
        ops.silu_mul(torch.empty(1, 2 * 14336, dtype=torch.bfloat16), rounding)
    index = torch.zeros(1, dtype=torch.int64)
    choose(torch.empty(1, 131072), index, index, torch.zeros(1, PARAMETERS, dtype=torch.float64), index)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--quick", action="store_true", help="the kernels of NeMo for an H100, in FP8 for an A100")
    quick = parser.parse_args().quick
    cases = QUICK if quick else [(card, model) for card in SHARED_KIB for model in MODELS]
    kernels: list[Compiled] = []

    def tell(kernel: Compiled) -> None:
        kernels.append(kernel)
        print(kernel, file=sys.stderr, flush=True)

    for capability, model in cases:
        print(model, file=sys.stderr)
        with compiling(capability, tell):
            attention_kernels(TritonOps(capability), model)
    for capability in () if quick else SHARED_KIB:
        with compiling(capability, tell):
            other_kernels(capability)
    faults = [kernel for kernel in kernels if kernel.fault]
    print(f"{len(kernels)} kernels compiled, {len(faults)} at fault")
    return 1 if faults or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
