"""Every CPU kernel against the plain-torch specification, on fresh seeded random inputs."""

from __future__ import annotations

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.ops import native
from engine.ops.cpu import CpuOps
from engine.ops.interface import AttentionBatch
from engine.ops.native import Kernels, load_kernels
from engine.ops.reference import ReferenceOps

REFERENCE = ReferenceOps()
DTYPES = [torch.float32, torch.bfloat16]
HEADS = [(9, 3, 64), (32, 8, 128), (4, 1, 16), (6, 2, 24), (70, 1, 8)]  # heads, kv heads, head_dim
MIXES = {  # (context before the step, new tokens) of each sequence
    "decode": [(0, 1), (63, 1), (64, 1), (130, 1)],
    "prefill": [(0, 70), (0, 1), (0, 33)],
    "mixed": [(100, 1), (65, 50), (0, 7), (3, 2), (40, 1), (0, 129)],
}


@pytest.fixture(scope="module")
def ops() -> CpuOps:
    return CpuOps(kernels())


def kernels() -> Kernels:
    found = load_kernels(threads=2)
    if found is None:
        pytest.skip("no C++ compiler on this machine")
    return found


@dataclass
class Case:
    batch: AttentionBatch
    keys: Tensor
    values: Tensor


def make_case(mix: list[tuple[int, int]], kv_heads: int, dim: int, page_size: int, dtype: torch.dtype) -> Case:
    """A cache of shuffled pages. What no sequence owns is NaN, so that any read beyond a context shows."""
    contexts = [past + new for past, new in mix]
    pages_of = [-(-context // page_size) for context in contexts]
    total = sum(pages_of) + 3
    order = torch.randperm(total).tolist()
    tables = torch.full((len(mix), max(pages_of) + 1), -1, dtype=torch.int32)
    keys, values = (torch.full((total, kv_heads, page_size, dim), torch.nan, dtype=dtype) for _ in range(2))
    positions, slots, starts = [], [], [0]
    for s, (past, new) in enumerate(mix):
        pages = [order.pop() for _ in range(pages_of[s])]
        tables[s, : len(pages)] = torch.tensor(pages)
        for p in range(past + new):
            page, offset = pages[p // page_size], p % page_size
            keys[page, :, offset], values[page, :, offset] = torch.randn(2, kv_heads, dim).to(dtype)
            if p >= past:
                positions.append(p)
                slots.append(page * page_size + offset)
        starts.append(len(positions))
    batch = AttentionBatch(
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        block_tables=tables,
        max_query_len=max(new for _, new in mix),
        max_context_len=max(contexts),
        query_starts_list=starts,
        context_lens_list=contexts,
    )
    return Case(batch, keys, values)


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
        actual = ops.attention(query, case.keys, case.values, case.batch, window)
        assert_close(actual, REFERENCE.attention(query, case.keys, case.values, case.batch, window))


def test_attention_survives_scores_of_any_size(ops: CpuOps) -> None:
    torch.manual_seed(1)
    case = make_case(MIXES["mixed"], 2, 64, 16, torch.float32)
    query = torch.randn(len(case.batch.positions), 4, 64) * 1e4
    actual = ops.attention(query, case.keys, case.values, case.batch, None)
    torch.testing.assert_close(actual, REFERENCE.attention(query, case.keys, case.values, case.batch, None))


def test_a_sequence_with_nan_in_its_cache_spoils_no_other(ops: CpuOps) -> None:
    torch.manual_seed(2)
    case = make_case(MIXES["mixed"], 2, 64, 16, torch.float32)
    query = torch.randn(len(case.batch.positions), 4, 64)
    clean = ops.attention(query, case.keys, case.values, case.batch, None)
    case.keys[case.batch.block_tables[1, 0]] = torch.nan
    spoilt = ops.attention(query, case.keys, case.values, case.batch, None)
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
    keys, values = case.keys.clone(), case.values.clone()
    expected = REFERENCE.rope_and_write(qkv.clone(), table, keys, values, case.batch)
    query = ops.rope_and_write(qkv, table, case.keys, case.values, case.batch)
    assert_close(query, expected)
    torch.testing.assert_close(case.keys, keys, rtol=2**-7, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(case.values, values, rtol=0, atol=0, equal_nan=True)


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


def test_concurrent_first_uses_leave_one_library(ops: CpuOps, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        libraries = list(pool.map(lambda _: load_kernels(1, tmp_path), range(2)))
    assert None not in libraries
    assert len(list(tmp_path.iterdir())) == 1


def test_without_a_compiler_there_is_one_warning_and_plain_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert load_kernels(1) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
