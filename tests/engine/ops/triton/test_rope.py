"""Rotation and cache write against the plain-torch specification, on fresh seeded random inputs."""

from __future__ import annotations

import pytest
import torch

from engine.ops.interface import LayerCache
from engine.ops.reference import ReferenceOps, quantise
from engine.ops.triton.rope import rope_and_write
from tests.engine.ops.cases import MIXES, assert_close, in_fp8, make_case, rotations

REFERENCE = ReferenceOps()
HEADS = [(9, 3, 64), (8, 2, 128), (4, 1, 16), (6, 2, 24), (12, 2, 96), (5, 1, 8)]  # heads, kv heads, head_dim


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_queries_are_rotated_and_only_the_slots_are_filled(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(heads * dim)
    case = make_case(MIXES["draft"], kv_heads, dim, 5, dtype)
    table = rotations(256, dim)
    qkv = torch.randn(len(case.batch.positions), (heads + 2 * kv_heads) * dim).to(dtype)
    theirs = LayerCache(case.cache.keys.clone(), case.cache.values.clone())
    expected = REFERENCE.rope_and_write(qkv.clone(), table, theirs, case.batch)
    assert_close(rope_and_write(qkv, table, case.cache, case.batch), expected)
    torch.testing.assert_close(case.cache.keys, theirs.keys, rtol=2**-7, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(case.cache.values, theirs.values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
def test_codes_and_scales_are_those_of_the_reference(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(heads * dim + 1)
    case = make_case(MIXES["draft"], kv_heads, dim, 16, torch.float32)
    table = rotations(256, dim)
    qkv = torch.randn(len(case.batch.positions), heads + 2 * kv_heads, dim) * torch.randn(1, heads + 2 * kv_heads, 1)
    qkv = (qkv * torch.randn(len(qkv), 1, 1).mul(3).exp()).flatten(1).to(dtype)
    mine, theirs = in_fp8(case.cache), in_fp8(case.cache)
    expected = REFERENCE.rope_and_write(qkv.clone(), table, theirs, case.batch)
    assert_close(rope_and_write(qkv, table, mine, case.batch), expected)
    assert mine.values.view(torch.uint8).equal(theirs.values.view(torch.uint8))
    torch.testing.assert_close(mine.value_scales, theirs.value_scales, rtol=0, atol=0, equal_nan=True)
    # The last bit of a rotation may differ: then a code that stood between two numbers may be the other one, of few.
    torch.testing.assert_close(mine.key_scales, theirs.key_scales, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(mine.keys.float(), theirs.keys.float(), rtol=2**-3, atol=2**-9)
    assert (mine.keys.view(torch.uint8) != theirs.keys.view(torch.uint8)).float().mean() < 1e-3


def test_numbers_of_every_size_become_the_codes_that_torch_makes() -> None:
    """Ties, the numbers below the normal ones, both zeros and what is beyond float32's own normal numbers."""
    torch.manual_seed(5)
    case = make_case([(0, 80)], 1, 128, 16, torch.float32)
    cache = in_fp8(case.cache)
    qkv = torch.randn(80, 3 * 128) * torch.randn(80, 1).mul(8).exp() * torch.randn(80, 3 * 128).mul(2).exp()
    qkv[:32] = torch.randint(-(2**12), 2**12, (32, 3 * 128)) / 2**9 * 7  # of these many are ties
    qkv[:, ::128] = 448.0
    qkv[7], qkv[8] = 0.0, -0.0
    qkv[9] *= torch.finfo(torch.float32).tiny / qkv[9].abs().max()
    unturned = torch.cat((torch.ones(80, 64), torch.zeros(80, 64)), dim=1)
    rope_and_write(qkv.clone(), unturned, cache, case.batch)
    page, offset = case.batch.slots // 16, case.batch.slots % 16
    written = ((cache.keys, cache.key_scales, 128), (cache.values, cache.value_scales, 256))
    for codes, scales, column in written:
        expected, expected_scales = quantise(qkv[:, column : column + 128])
        assert scales is not None
        assert torch.equal(scales[page, 0, offset], expected_scales)
        mine, theirs = codes[page, 0, offset].float(), expected.float()
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_vector_that_is_not_all_finite_has_no_finite_scale(bad: float) -> None:
    case = make_case([(0, 2)], 1, 64, 16, torch.float32)
    cache = in_fp8(case.cache)
    qkv = torch.randn(2, 3 * 64)
    qkv[1, 2 * 64 + 5] = bad
    rope_and_write(qkv, rotations(2, 64), cache, case.batch)
    scales, page = cache.value_scales, case.batch.block_tables[0, 0]
    assert scales is not None
    assert scales[page, 0, 0].isfinite()
    assert scales[page, 0, 1].isnan()


@pytest.mark.parametrize("fp8", [False, True])
def test_a_token_without_a_slot_is_written_nowhere(fp8: bool) -> None:
    case = make_case([(0, 3)], 2, 32, 16, torch.float32)
    case.batch.slots[1] = -1
    cache = in_fp8(case.cache) if fp8 else case.cache
    pages = (cache.keys, cache.values)
    before = [stored.clone() for stored in pages]
    rope_and_write(torch.randn(3, 6 * 32), rotations(3, 32), cache, case.batch)
    page = case.batch.block_tables[0, 0]
    for stored, old in zip(pages, before, strict=True):
        changed = (stored.view(torch.uint8) != old.view(torch.uint8)).flatten(3).any(-1).any(1)
        assert changed.nonzero().tolist() == [[page, 0], [page, 2]]
