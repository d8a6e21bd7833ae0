"""`python -m bench.kernels`: every weight format at every number of rows, beside what the cores can do at best.

    all matrices of a model, layer by layer ──► seconds of a pass ──► GB/s, GFLOP/s, % of the limit

As in decoding, weights come from memory: all layers together are larger than the last cache. A product takes at least
the time in which its multiply-adds pass through the registers, and at least that in which its weights are read; the
later of the two is the limit. Both rates are measured here, on one core, and count once per thread; memory is shared,
so with several threads the limit of few rows may lie beyond what it gives. The fastest of several passes counts; with
one thread it is CPU time, of which what else runs on the core takes none.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.measure import Machine, this_machine, write_result
from bench.options import names, numbers
from engine.ops import Kernels, find_compiler, load_kernels
from engine.quant.blocked import BLOCK, BlockedLinear
from engine.quant.form import Form
from engine.quant.matrix import FloatMatrix, Fp8Matrix, GroupMatrix, Matrix

READ_BYTES = 2**28  # far beyond any cache
TRIES = 5
HEAD_ROWS = 64  # a step asks for the logits of no more rows than it has sequences
FORMS = {
    "bf16": Form(16, 0),
    "fp8": Form(0, 0),
    "int8": Form(8, 64),
    "int6": Form(6, 64),
    "q6": Form(6, 16),  # of Q6_K
    "int5": Form(5, 32),
    "int4": Form(4, 32),
}


@dataclass(frozen=True)
class Model:
    """(outputs, inputs) of the matrices of a layer, and of the head."""

    layer: tuple[tuple[int, int], ...]
    layers: int
    head: tuple[int, int]


MODELS = {
    "smollm2-135m": Model(((960, 576), (576, 576), (3072, 576), (576, 1536)), 30, (49152, 576)),
    "1b": Model(((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)), 4, (32768, 2048)),  # 4 of its 16 layers
}


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Of one core."""

    flops_per_second: float
    read_bytes_per_second: float


class Pass(msgspec.Struct, frozen=True, kw_only=True):
    """All layers once, the head with them up to HEAD_ROWS rows. `limit` is the share of the limit that was reached."""

    form: str
    rows: int
    seconds: float
    bytes_per_second: float
    flops_per_second: float
    limit: float


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A result file."""

    started_at: str  # ISO 8601, UTC
    machine: Machine
    model: str
    threads: int
    limits: Limits
    passes: list[Pass]


@click.command(context_settings={"show_default": True})
@click.option("--model", type=click.Choice(list(MODELS)), default="smollm2-135m", help="whose shapes")
@click.option("--forms", callback=names(FORMS), default=",".join(FORMS), help="weight formats")
@click.option("--rows", callback=numbers, default="1,2,4,8,16,32,64,128,512", help="numbers of rows")
@click.option("--threads", type=click.IntRange(1), default=1, help="OpenMP threads")
@click.option("--passes", type=click.IntRange(1), default=5, help="of which the fastest counts")
@click.option("--json", type=click.Path(path_type=Path), help="also write the result to this file")
def main(model: str, forms: list[str], rows: list[int], threads: int, passes: int, json: Path | None) -> None:
    """Measure the CPU kernels of linear maps beside the limits of a core."""
    kernels = load_kernels(threads)
    if kernels is None:
        raise SystemExit("there are no compiled kernels to measure; see above")
    torch.set_num_threads(threads)
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    machine, limits = this_machine(), measure_limits(kernels)
    measured: list[Pass] = []
    for form in forms:
        layers, head = build(MODELS[model], FORMS[form], kernels)
        for count in rows:
            linears = [*layers, *([head] if count <= HEAD_ROWS else [])]
            inputs = {linear.shape[1]: torch.randn(count, linear.shape[1]).bfloat16() for linear in linears}
            seconds = min(time_pass(linears, inputs, threads) for _ in range(passes))
            flops = 2 * count * sum(outputs * width for outputs, width in (linear.shape for linear in linears))
            weight_bytes = sum(linear.map.nbytes for linear in linears)
            least = max(flops / limits.flops_per_second, weight_bytes / limits.read_bytes_per_second) / threads
            measured.append(
                Pass(
                    form=form,
                    rows=count,
                    seconds=seconds,
                    bytes_per_second=weight_bytes / seconds,
                    flops_per_second=flops / seconds,
                    limit=least / seconds,
                )
            )
    result = Result(
        started_at=started_at, machine=machine, model=model, threads=threads, limits=limits, passes=measured
    )
    if json is not None:
        write_result(json, result)
    show(result, Console())


def measure_limits(kernels: Kernels) -> Limits:
    """Best of several tries, by a program that is compiled now."""
    compiler = find_compiler()
    assert compiler is not None  # which compiled the kernels
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "limits.so"
        source = Path(__file__).with_name("limits.cpp")
        flags = ["-std=c++20", "-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(source), "-o", str(path)], check=True, timeout=60)
        library = ctypes.CDLL(str(path))
    library.peak_flops.restype = library.read_bandwidth.restype = ctypes.c_double
    library.read_bandwidth.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    memory = torch.empty(READ_BYTES, dtype=torch.uint8)
    kernels.library.nemo_use_huge_pages(memory.data_ptr(), READ_BYTES, False)  # as weights have
    memory.fill_(1)
    return Limits(
        flops_per_second=max(library.peak_flops() for _ in range(TRIES)),
        read_bytes_per_second=max(library.read_bandwidth(memory.data_ptr(), READ_BYTES) for _ in range(TRIES)),
    )


@dataclass(frozen=True)
class Shaped:
    """A linear map and its (outputs, inputs)."""

    map: BlockedLinear
    shape: tuple[int, int]


def build(model: Model, form: Form, kernels: Kernels) -> tuple[list[Shaped], Shaped]:
    """All layers of a model, and its head, of random codes."""
    layers = [random_linear(form, shape, kernels) for _ in range(model.layers) for shape in model.layer]
    return layers, random_linear(form, model.head, kernels, wide=True)


def random_linear(form: Form, shape: tuple[int, int], kernels: Kernels, wide: bool = False) -> Shaped:
    outputs, inputs = shape
    linear = BlockedLinear(form, outputs, inputs, bias=None, wide=wide, quantise_inputs=False, kernels=kernels)
    slab = 64 * BLOCK
    for start in range(0, outputs, slab):
        linear.fill(start, random_matrix(form, min(slab, outputs - start), inputs))
    return Shaped(linear, shape)


def random_matrix(form: Form, outputs: int, inputs: int) -> Matrix:
    scales = torch.rand(outputs, form.groups(inputs))
    match form.bits:
        case 16:
            return FloatMatrix(torch.randn(outputs, inputs))
        case 0:
            return Fp8Matrix(torch.randn(outputs, inputs).to(torch.float8_e4m3fn), scales)
    codes = torch.randint(0, 2**form.bits, (outputs, inputs), dtype=torch.uint8)
    return GroupMatrix(codes, form.bits, form.group, scales, scales)


def time_pass(linears: list[Shaped], inputs: dict[int, Tensor], threads: int) -> float:
    """Seconds."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    began = clock()
    for linear in linears:
        linear.map(inputs[linear.shape[1]])
    return clock() - began


def show(result: Result, console: Console) -> None:
    """One line per format and number of rows."""
    table = Table(title=f"{result.model}, threads: {result.threads}", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("weights")
    for column in ("rows", "ms", "GB/s", "GFLOP/s", "of the limit"):
        table.add_column(column, justify="right")
    for each in result.passes:
        table.add_row(
            each.form,
            str(each.rows),
            f"{1000 * each.seconds:.2f}",
            f"{each.bytes_per_second / 1e9:.1f}",
            f"{each.flops_per_second / 1e9:.0f}",
            f"{100 * each.limit:.0f} %",
        )
    console.print(table)
    limits = result.limits
    console.print(
        f"one core: {limits.flops_per_second / 1e9:.0f} GFLOP/s in registers, reads "
        f"{limits.read_bytes_per_second / 1e9:.1f} GB/s; load average before: {result.machine.load_average:.2f}"
    )


if __name__ == "__main__":
    main()
