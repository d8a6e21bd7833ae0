"""Every CPU kernel against the plain-torch specification, on fresh seeded random inputs."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.ops import native
from engine.ops.cpu import CpuOps
from engine.ops.interface import AttentionBatch, LayerCache
from engine.ops.native import Kernels, load_kernels
from engine.ops.reference import ReferenceOps, numbers_of
from tests.compiled import compiled
from tests.engine.ops.cases import MIXES, in_fp8, make_case

REFERENCE = ReferenceOps()
DTYPES = [torch.float32, torch.bfloat16]
HEADS = [(9, 3, 64), (32, 8, 128), (4, 1, 16), (6, 2, 24), (70, 1, 8)]  # heads, kv heads, head_dim
FP8_HEADS = [(2, 2, 64), (4, 2, 128), (3, 1, 64), (8, 2, 128), (8, 1, 128), (10, 2, 24)]


@pytest.fixture(scope="module")
def ops() -> CpuOps:
    return CpuOps(kernels())


@pytest.fixture(scope="module", params=["native", "x86-64-v3"])
def any_ops(request: pytest.FixtureRequest) -> CpuOps:
    """As compiled for this CPU, and for one without 512-bit vectors, whose codes are read and written differently."""
    return CpuOps(kernels(request.param))


def kernels(architecture: str = "native") -> Kernels:
    return compiled(threads=2, architecture=architecture)


def everything(cache: LayerCache) -> tuple[Tensor, Tensor]:
    pages = torch.arange(len(cache.keys))
    return numbers_of(cache.keys, cache.key_scales, pages), numbers_of(cache.values, cache.value_scales, pages)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Float32 to rounding; bfloat16 to one unit in the last place, which the order of a sum may move."""
    assert actual.dtype == expected.dtype
    relative, absolute = (1e-5, 2e-6) if expected.dtype == torch.float32 else (2**-7, 1e-3)
    torch.testing.assert_close(actual, expected, rtol=relative, atol=absolute)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 37])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_attention_is_the_references_for_any_page_size(
    ops: CpuOps, heads: int, kv_heads: int, dim: int, mix: str, window: int | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(heads * dim)
    for page_size in (1, 7, 16, 64):
        case = make_case(MIXES[mix], kv_heads, dim, page_size, dtype)
        tokens = len(case.batch.positions)
        query = torch.randn(tokens, heads + 2 * kv_heads, dim).to(dtype)[:, :heads]  # strided, as it comes from qkv
        actual = ops.attention(query, case.cache, case.batch, window)
        assert_close(actual, REFERENCE.attention(query, case.cache, case.batch, window))


@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_the_reference_gives_the_same_however_few_scores_it_holds(
    heads: int, kv_heads: int, dim: int, mix: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(heads + dim)
    case = make_case(MIXES[mix], kv_heads, dim, 16, torch.float32)
    query = torch.randn(len(case.batch.positions), heads, dim)
    at_once = REFERENCE.attention(query, case.cache, case.batch, window)
    for slab in (1, 3 * heads * case.batch.max_context_len):
        monkeypatch.setattr("engine.ops.reference.SCORE_SLAB", slab)
        assert_close(REFERENCE.attention(query, case.cache, case.batch, window), at_once)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), FP8_HEADS)
def test_attention_over_fp8_is_the_references_for_any_page_size(
    any_ops: CpuOps, heads: int, kv_heads: int, dim: int, mix: str, window: int | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(heads * dim + 1)
    for page_size in (1, 7, 64):
        case = make_case(MIXES[mix], kv_heads, dim, page_size, torch.float32)
        for numbers in (case.cache.keys, case.cache.values):  # scales of every size
            numbers *= torch.randn(*numbers.shape[:3], 1).mul(3).exp() if numbers is case.cache.values else 1
        cache = in_fp8(case.cache)
        query = torch.randn(len(case.batch.positions), heads + 2 * kv_heads, dim).to(dtype)[:, :heads]
        actual = any_ops.attention(query, cache, case.batch, window)
        expected = REFERENCE.attention(query, cache, case.batch, window)
        size = cache.value_scales.nan_to_num().max().item() * 448  # type: ignore[union-attr]
        assert_close(actual / size, expected / size)


def test_every_code_is_read_and_written_as_torch_reads_it(any_ops: CpuOps) -> None:
    """One query that picks out one value: all 254 codes of numbers come through attention unchanged."""
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn).float()
    case = make_case([(0, 1)], 1, len(codes), 1, torch.float32)
    page = case.batch.block_tables[0, 0].item()
    cache = in_fp8(case.cache)
    cache.values.view(torch.uint8)[page, 0, 0] = codes
    cache.value_scales[page] = 0.5  # type: ignore[index]
    out = any_ops.attention(torch.zeros(1, 1, len(codes)), cache, case.batch, None)
    assert torch.equal(out[0], numbers * 0.5)
    table = torch.cat((torch.ones(1, len(codes) // 2), torch.zeros(1, len(codes) // 2)), dim=1)
    any_ops.rope_and_write(numbers.repeat(3).view(1, -1), table, cache, case.batch)
    for written, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales)):
        assert scales[page].item() == 1.0  # type: ignore[index]
        assert torch.equal(written[page, 0, 0].float(), numbers)


def test_attention_survives_scores_of_any_size(ops: CpuOps) -> None:
    torch.manual_seed(1)
    case = make_case(MIXES["mixed"], 2, 64, 16, torch.float32)
    query = torch.randn(len(case.batch.positions), 4, 64) * 1e4
    actual = ops.attention(query, case.cache, case.batch, None)
    expected = REFERENCE.attention(query, case.cache, case.batch, None)
    # Scores reach 5e4, where float32 has steps of 4e-3: so much of a weight is rounding, where two of them compete.
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_the_bits_of_a_token_do_not_depend_on_chunk_or_batch(
    any_ops: CpuOps, heads: int, kv_heads: int, dim: int, window: int | None, fp8: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(6)
    case = make_case([(0, 300)], kv_heads, dim, 7, torch.float32 if fp8 else dtype)
    cache = in_fp8(case.cache) if fp8 else case.cache
    query = torch.randn(300, heads, dim).to(dtype)
    whole = any_ops.attention(query, cache, case.batch, window)
    for cuts in ([0, 1, 2, 70, 130, 299, 300], list(range(0, 301, 20))):
        batch = chunks_of(case.batch, cuts)
        assert torch.equal(any_ops.attention(query, cache, batch, window), whole)
    for last in (0, 127, 128, 299):  # alone, its tiles are shared out to the threads
        alone = dataclasses.replace(
            case.batch,
            query_starts=torch.tensor([0, 1], dtype=torch.int32),
            context_lens=torch.tensor([last + 1], dtype=torch.int32),
            max_query_len=1,
            query_starts_list=[0, 1],
            context_lens_list=[last + 1],
        )
        assert torch.equal(any_ops.attention(query[last : last + 1], cache, alone, window)[0], whole[last])


def chunks_of(batch: AttentionBatch, cuts: list[int]) -> AttentionBatch:
    """The tokens between two cuts of the only sequence as sequences of their own, over the same pages."""
    spans = list(pairwise(cuts))
    return dataclasses.replace(
        batch,
        query_starts=torch.tensor(cuts, dtype=torch.int32),
        context_lens=torch.tensor(cuts[1:], dtype=torch.int32),
        block_tables=batch.block_tables.repeat(len(spans), 1),
        max_query_len=max(end - start for start, end in spans),
        query_starts_list=cuts,
        context_lens_list=cuts[1:],
    )


@pytest.mark.parametrize("fp8", [False, True])
def test_a_sequence_with_nan_in_its_cache_spoils_no_other(ops: CpuOps, fp8: bool) -> None:
    torch.manual_seed(2)
    case = make_case(MIXES["mixed"], 2, 64, 16, torch.float32)
    query = torch.randn(len(case.batch.positions), 4, 64)
    clean = ops.attention(query, in_fp8(case.cache) if fp8 else case.cache, case.batch, None)
    case.cache.keys[case.batch.block_tables[1, 0]] = torch.nan
    spoilt = ops.attention(query, in_fp8(case.cache) if fp8 else case.cache, case.batch, None)
    of_it = slice(case.batch.query_starts_list[1], case.batch.query_starts_list[2])
    assert spoilt[of_it].isnan().all()
    spoilt[of_it] = clean[of_it]
    assert torch.equal(spoilt, clean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_rope_and_write_rotates_queries_and_fills_only_its_slots(
    ops: CpuOps, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(3)
    case = make_case(MIXES["mixed"], kv_heads, dim, 5, dtype)
    angles = torch.rand(256, dim // 2) * 6
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    qkv = torch.randn(len(case.batch.positions), (heads + 2 * kv_heads) * dim).to(dtype)
    theirs = LayerCache(case.cache.keys.clone(), case.cache.values.clone())
    expected = REFERENCE.rope_and_write(qkv.clone(), table, theirs, case.batch)
    query = ops.rope_and_write(qkv, table, case.cache, case.batch)
    assert_close(query, expected)
    torch.testing.assert_close(case.cache.keys, theirs.keys, rtol=2**-7, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(case.cache.values, theirs.values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), FP8_HEADS)
def test_rope_and_write_in_fp8_fills_only_its_slots(
    any_ops: CpuOps, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(4)
    case = make_case(MIXES["mixed"], kv_heads, dim, 5, dtype)
    angles = torch.rand(256, dim // 2) * 6
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    qkv = torch.randn(len(case.batch.positions), heads + 2 * kv_heads, dim) * torch.randn(1, heads + 2 * kv_heads, 1)
    qkv = (qkv * torch.randn(len(qkv), 1, 1).exp()).flatten(1).to(dtype)
    mine, theirs = in_fp8(case.cache), in_fp8(case.cache)
    expected = REFERENCE.rope_and_write(qkv.clone(), table, theirs, case.batch)
    assert_close(any_ops.rope_and_write(qkv, table, mine, case.batch), expected)
    assert mine.values.view(torch.uint8).equal(theirs.values.view(torch.uint8))
    torch.testing.assert_close(mine.value_scales, theirs.value_scales, rtol=0, atol=0, equal_nan=True)
    # The last bit of a rotation may differ: then a code that stood between two numbers may be the other one, of few.
    torch.testing.assert_close(mine.key_scales, theirs.key_scales, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(mine.keys.float(), theirs.keys.float(), rtol=2**-3, atol=2**-9)
    assert (mine.keys.view(torch.uint8) != theirs.keys.view(torch.uint8)).float().mean() < 1e-4


@pytest.mark.parametrize("through", ["kernel", "reference"])
def test_what_is_read_back_from_fp8_is_near_what_was_written(any_ops: CpuOps, through: str) -> None:
    """Within half a step of e4m3: 2 ** -4 of a number, 2 ** -10 of the scale below the normal numbers."""
    torch.manual_seed(5)
    case = make_case([(0, 3000)], 1, 128, 16, torch.float32)
    cache = in_fp8(case.cache)
    table = torch.cat((torch.ones(3000, 64), torch.zeros(3000, 64)), dim=1)
    qkv = torch.randn(3000, 3 * 128) * torch.randn(3000, 1).mul(8).exp() * torch.randn(3000, 3 * 128).exp()
    qkv[7] = 0.0
    qkv[8] *= torch.finfo(torch.float32).tiny / qkv[8].abs().max()
    (any_ops if through == "kernel" else REFERENCE).rope_and_write(qkv.clone(), table, cache, case.batch)
    page, offset = case.batch.slots // 16, case.batch.slots % 16
    read = zip(everything(cache), (cache.key_scales, cache.value_scales), qkv[:, 128:].split(128, dim=1), strict=True)
    for numbers, scales, written in read:
        step = scales[page, 0, offset].unsqueeze(1)  # type: ignore[index]
        error = (numbers[page, 0, offset] - written).abs()
        assert (error <= torch.maximum(written.abs() * 2**-4, step * 2**-10) * (1 + 1e-6)).all()
        assert (numbers[page, 0, offset][7] == 0).all()


@pytest.mark.parametrize("through", ["kernel", "reference"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_read_back_from_fp8_as_none(any_ops: CpuOps, through: str, bad: float) -> None:
    case = make_case([(0, 2)], 1, 64, 16, torch.float32)
    cache = in_fp8(case.cache)
    qkv = torch.randn(2, 3 * 64)
    qkv[1, 2 * 64 + 5] = bad
    table = torch.cat((torch.ones(2, 32), torch.zeros(2, 32)), dim=1)
    (any_ops if through == "kernel" else REFERENCE).rope_and_write(qkv, table, cache, case.batch)
    _, values = everything(cache)
    page = case.batch.block_tables[0, 0]
    assert values[page, 0, 0].isfinite().all()
    assert values[page, 0, 1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 576), (5, 40), (300, 576), (2, 5120)])
def test_norms_and_activation_are_the_references(ops: CpuOps, rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    x, weight = torch.randn(rows, width).to(dtype), torch.rand(width).to(dtype)
    residual = torch.randn(rows, width)
    sums = residual.clone()
    expected = REFERENCE.add_rms_norm(x, sums, weight, 1e-5)
    assert_close(ops.add_rms_norm(x, residual, weight, 1e-5), expected)
    assert torch.equal(residual, sums)
    gate_up = torch.randn(rows, 2 * width).to(dtype) * 20
    assert_close(ops.silu_mul(gate_up), REFERENCE.silu_mul(gate_up))


def test_not_a_number_stays_not_a_number(ops: CpuOps) -> None:
    x = torch.tensor([[1.0, torch.nan, 2.0, 3.0]])
    for dtype in DTYPES:
        assert ops.add_rms_norm(x.to(dtype), torch.zeros(1, 4), torch.ones(4, dtype=dtype), 1e-5).isnan().all()
        assert ops.silu_mul(x.to(dtype)).isnan().tolist() == [[False, True]]


def test_the_kernels_run_on_torchs_own_openmp_pool(ops: CpuOps) -> None:
    code = (
        "from engine.ops.native import load_kernels; import torch; load_kernels(2)\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "print(len({word for word in maps if 'libgomp' in word}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "1"


def test_concurrent_first_uses_leave_one_library_for_later_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = tmp_path / "small.cpp", tmp_path / "cache"  # ours takes 13 s of a core
    source.write_text("".join(f'extern "C" void {name}() {{}}\n' for name in native.SIGNATURES))
    monkeypatch.setattr(native, "SOURCES", [source])
    with ThreadPoolExecutor(2) as pool:
        libraries = list(pool.map(lambda _: load_kernels(1, cache), range(2)))
    assert None not in libraries
    (library,) = cache.iterdir()
    stamp = library.stat().st_mtime_ns
    assert load_kernels(1, cache) is not None
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [stamp]


def test_without_a_compiler_there_is_one_warning_and_plain_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert load_kernels(1) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_compiler_that_does_not_end_is_given_up_by_name_whatever_it_has_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "warning: some" >&2; exec sleep 600; }\n')
    compiler.chmod(0o700)
    monkeypatch.setattr(native.shutil, "which", lambda name: str(compiler))
    monkeypatch.setattr(native, "COMPILE_SECONDS", 0.5)
    assert load_kernels(1, tmp_path / "cache") is None
    [record] = caplog.records
    assert "timed out after 0.5 seconds" in record.getMessage()
