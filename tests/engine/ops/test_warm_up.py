"""Warm-up on a GPU launches every kernel that a server can come to need: nothing is compiled while requests wait.

Launches are noted down instead of made, by what Triton compiles a kernel of its own for: constants, types of tensors
and whether their address is a multiple of 16, whether a number is one or is 1.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from engine.ops.interface import CodedWeight, LayerCache, Quantised
from engine.rows import Rows
from engine.runner import WarmUpStep, warm_up_steps
from engine.sampling.device import DeviceRows
from engine.step import RowWork

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from triton.runtime.jit import JITFunction, KernelParam

from engine.ops.triton import TritonOps
from engine.ops.triton.linear import TritonProducts
from engine.ops.triton.sampler import choose

CPU = torch.device("cpu")
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
PAGE_SIZE = 64
VOCABULARY = 8192

Work = list[tuple[int, int]]  # of each row: where it starts, and how many tokens it computes


class Launches:
    """What a model of one layer launches in a step without recordings."""

    def __init__(self, rows: int, max_len: int, weights: list[CodedWeight], rounded: bool, window: int | None) -> None:
        self.kinds: set[Any] = set()
        self._rows = Rows(rows, -(-max_len // PAGE_SIZE), PAGE_SIZE, CPU)
        self._products = TritonProducts(CPU, 132, decodes=True)
        self._ops, self._sampler = TritonOps((9, 0)), DeviceRows(rows, CPU, choose)
        self._weights, self._rounded, self._window = weights, rounded, window
        pages = torch.empty(1, KV_HEADS, PAGE_SIZE, HEAD_DIM, dtype=torch.bfloat16)
        self._cache = LayerCache(pages, pages)

    def note(self, kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        found = tuple(kind_of(parameter, argument) for parameter, argument in zip(kernel.params, args, strict=False))
        self.kinds.add((kernel.__name__, found, tuple(sorted((name, str(each)) for name, each in constants.items()))))

    def step(self, work: Work) -> None:
        tokens = [RowWork(row, start, [0] * count, [], sample=True) for row, (start, count) in enumerate(work)]
        batch = self._rows.batch(tokens).attention
        qkv = torch.empty(len(batch.positions), (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=torch.bfloat16)
        query = self._ops.rope_and_write(qkv, torch.empty(1, HEAD_DIM), self._cache, batch)
        self._ops.attention(query, self._cache, batch, self._window)
        self._sampler.choose(torch.empty(len(work), VOCABULARY), [*range(len(work))], [0] * len(work))
        for weight, rows in zip(self._weights, (len(query), len(work)), strict=True):
            x = torch.empty(rows, weight.inputs, dtype=torch.bfloat16)
            given = Quantised(x.to(torch.float8_e4m3fn), torch.empty(rows), x.dtype) if self._rounded else x
            if rows <= self._products.most_rows(weight):
                self._products.multiply(given, weight, None, wide=False)
            else:  # in slabs, as `CodedLinear` does
                for start in range(0, weight.outputs, 400):
                    self._products.decode(weight, start, min(start + 400, weight.outputs), torch.bfloat16)


def kind_of(parameter: KernelParam, argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return argument.dtype, parameter.do_not_specialize_on_alignment or argument.data_ptr() % 16 == 0
    if isinstance(argument, int) and not parameter.do_not_specialize:
        return argument == 1, parameter.do_not_specialize_on_alignment or argument % 16 == 0
    return type(argument)


def fp8(outputs: int, inputs: int) -> CodedWeight:
    codes = torch.empty(outputs, inputs, dtype=torch.float8_e4m3fn)
    return CodedWeight(codes, None, torch.empty(1, outputs), None, 0, 0, outputs, inputs)


def int8(outputs: int, inputs: int) -> CodedWeight:
    codes, scales = torch.empty(inputs, outputs, dtype=torch.uint8), torch.empty(inputs // 64, outputs).half()
    return CodedWeight(codes, None, scales, None, 8, 64, outputs, inputs)


def of_warm_up(step: WarmUpStep) -> Work:
    return [(step.start, step.tokens), *[(0, 1)] * (step.rows - 1)]


def random_step(generator: torch.Generator, rows: int, tokens: int, max_len: int) -> Work:
    """Some rows that decode, with or without drafts, and some prompts or chunks of them, as far as the budget goes."""

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    work: Work = []
    most = [1, 8, 40, tokens][integer(0, 3)]
    longest = [1, 60, 300, max_len][integer(0, 3)]
    left = tokens
    for _ in range(integer(1, integer(1, rows))):
        if not left:
            break
        count = integer(1, min(most, left))
        work.append((min(integer(0, longest), max_len - count), count))
        left -= count
    return work


@pytest.mark.parametrize(("rows", "tokens"), [(32, 512), (256, 2048), (4, 64)])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("window", [None, 1024])
@torch.inference_mode()
def test_no_kernel_is_launched_for_the_first_time_by_a_request(
    rows: int, tokens: int, rounded: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    max_len = 4096
    make = fp8 if rounded else int8
    launches = Launches(rows, max_len, [make(1024, 2048), make(4096, 2048)], rounded, window)
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **options: launches.note(kernel, *args, **options))
    for step in warm_up_steps("cuda", rows, tokens, max_len):
        launches.step(of_warm_up(step))
    warm = set(launches.kinds)
    generator = torch.Generator().manual_seed(rows)
    for _ in range(300):
        work = random_step(generator, rows, tokens, max_len)
        launches.step(work)
        assert launches.kinds == warm, (launches.kinds - warm, work)
