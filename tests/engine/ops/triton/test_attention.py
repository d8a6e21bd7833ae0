"""Paged attention against the plain-torch specification, on fresh seeded random inputs.

The interpreter takes milliseconds for each program: shapes are small, and contexts are cut only where that is asked.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.ops.reference import ReferenceOps
from engine.ops.triton.attention import FEW_QUERIES, MAX_PARTS, Tile, attention, count_parts, few_tile, many_tile
from engine.ops.triton.pages import PlainPages
from tests.engine.ops.cases import Case, assert_close, in_fp8, make_case

REFERENCE = ReferenceOps()
module = sys.modules["engine.ops.triton.attention"]  # the package has the function under this name
A100, H100 = (8, 0), (9, 0)  # codes decoded from bits; by the hardware
F32, BF16 = torch.float32, torch.bfloat16
HEADS = [  # heads, kv heads, head_dim, dtype
    (8, 2, 32, BF16),
    (3, 1, 16, F32),
    (14, 2, 96, BF16),
    (70, 1, 8, F32),
]
SMALL = {
    "decode": [(0, 1), (15, 1), (16, 1), (70, 1), (129, 1)],
    "draft": [(0, 3), (15, 8), (64, 1), (60, 5)],
    "prefill": [(0, 40), (0, 17)],
    "mixed": [(50, 1), (65, 9), (0, 7), (3, 2), (0, 20)],
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles to a context, several programs to a prompt, one part; memory that nobody wrote is NaN."""
    monkeypatch.setattr(module, "PROGRAMS", 1)
    monkeypatch.setattr(module, "few_tile", lambda rows, *_, **__: Tile(rows, 16, 4, 1))
    monkeypatch.setattr(module, "many_tile", lambda *_, **__: Tile(32, 16, 4, 1))
    fresh = torch.Tensor.new_empty

    def unwritten(like: Tensor, *shape: int, **kind: Any) -> Tensor:
        made = fresh(like, *shape, **kind)
        return made.fill_(torch.nan) if made.dtype in (F32, BF16) else made

    monkeypatch.setattr(torch.Tensor, "new_empty", unwritten)


def compare(
    case: Case, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, window: int | None, capability: tuple[int, int]
) -> None:
    query = torch.randn(len(case.batch.positions), heads + 2 * kv_heads, dim).to(dtype)[:, :heads]  # strided, as of qkv
    actual = attention(query, case.cache, case.batch, window, capability)
    assert_close(actual, REFERENCE.attention(query, case.cache, case.batch, window))


@pytest.mark.parametrize("mix", SMALL)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "dtype"), HEADS)
def test_every_token_sees_what_the_reference_sees(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, mix: str
) -> None:
    torch.manual_seed(heads * dim)
    compare(make_case(SMALL[mix], kv_heads, dim, 16, dtype), heads, kv_heads, dim, dtype, None, H100)


@pytest.mark.parametrize(("page_size", "window"), [(1, 21), (7, 1), (7, None), (64, 21)])
@pytest.mark.parametrize("mix", SMALL)
def test_a_window_hides_what_lies_before_it_for_any_page_size(mix: str, page_size: int, window: int | None) -> None:
    torch.manual_seed(page_size)
    compare(make_case(SMALL[mix], 2, 16, page_size, torch.float32), 4, 2, 16, torch.float32, window, H100)


@pytest.mark.parametrize("mix", SMALL)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype", "capability"),
    [(8, 2, 32, BF16, A100), (8, 2, 32, BF16, H100), (2, 2, 24, F32, A100)],
)
def test_codes_are_read_with_their_scales(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, mix: str, capability: tuple[int, int]
) -> None:
    torch.manual_seed(heads * dim + 1)
    case = make_case(SMALL[mix], kv_heads, dim, 16, torch.float32)
    case.cache.keys.mul_(torch.randn(*case.cache.keys.shape[:3], 1).exp())  # scales of many sizes
    case.cache.values.mul_(torch.rand(*case.cache.values.shape[:3], 1))
    compare(Case(case.batch, in_fp8(case.cache)), heads, kv_heads, dim, dtype, None, capability)


@pytest.mark.parametrize("capability", [A100, H100])
def test_all_codes_of_numbers_are_read_as_torch_reads_them(capability: tuple[int, int]) -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    case = make_case([(0, 1)], 1, len(codes), 16, torch.float32)
    page, cache = case.batch.block_tables[0, 0], in_fp8(case.cache)
    cache.values.view(torch.uint8)[page, 0, 0] = codes
    assert cache.value_scales is not None
    cache.value_scales[page] = 0.5
    out = attention(torch.zeros(1, 1, len(codes)), cache, case.batch, None, capability)
    assert torch.equal(out[0], codes.view(torch.float8_e4m3fn).float() * 0.5)


@pytest.mark.parametrize(("mix", "window"), [("decode", None), ("draft", 37), ("mixed", None), ("mixed", 37)])
def test_a_context_cut_into_parts_gives_the_same(mix: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(40)
    monkeypatch.setattr(module, "PROGRAMS", 40)
    monkeypatch.setattr(module, "LEAST_PART", 20)
    compare(make_case(SMALL[mix], 1, 32, 16, torch.float32), 4, 1, 32, torch.float32, window, H100)


def test_a_long_sequence_is_cut_more_often_than_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(11)
    monkeypatch.setattr(module, "PART_TOKENS", 64)
    compare(make_case([(400, 1), (3, 1), (150, 1)], 1, 16, 16, torch.float32), 4, 1, 16, torch.float32, None, H100)


def test_the_tables_of_the_cards_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "few_tile", few_tile)
    monkeypatch.setattr(module, "many_tile", many_tile)
    torch.manual_seed(12)
    for dtype, fp8 in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        case = make_case([(60, 1), (100, 40)], 1, 128, 64, torch.float32 if fp8 else dtype)
        if fp8:
            case = Case(case.batch, in_fp8(case.cache))
        for capability in (A100, H100):
            compare(case, 4, 1, 128, dtype, None, capability)


@pytest.mark.parametrize("programs", [1, 264])
def test_a_batch_made_for_a_larger_graph_gives_the_same(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds are a bucket's, and sequences without context or without tokens fill the batch up."""
    torch.manual_seed(13)
    monkeypatch.setattr(module, "PROGRAMS", programs)
    case = make_case([(70, 1), (3, 1)], 1, 16, 16, torch.float32)
    exact, query = case.batch, torch.randn(4, 4, 16)
    ends = [0, 1, 2, 3, 4, 4]
    padded = replace(
        exact,
        query_starts=torch.tensor(ends, dtype=torch.int32),
        context_lens=torch.tensor([*exact.context_lens_list, 0, 0, 0], dtype=torch.int32),
        block_tables=torch.cat((exact.block_tables, torch.full((3, exact.block_tables.shape[1]), 2**30)), dim=0).int(),
        max_query_len=1,
        max_context_len=4096,
    )
    out = attention(query, case.cache, padded, None, H100)
    assert_close(out[:2], REFERENCE.attention(query[:2], case.cache, exact, None))
    assert (out[2:] == 0).all()


@pytest.mark.parametrize("queries", [1, FEW_QUERIES, FEW_QUERIES + 1])
def test_a_launch_that_was_recorded_for_many_drafts_serves_few(queries: int) -> None:
    torch.manual_seed(14)
    case = make_case([(20, queries)], 1, 16, 16, torch.float32)
    query = torch.randn(16, 4, 16)
    recorded = replace(case.batch, max_query_len=16, query_starts_list=[], context_lens_list=[])
    out = attention(query, case.cache, recorded, None, H100)
    assert_close(out[:queries], REFERENCE.attention(query[:queries], case.cache, case.batch, None))


@pytest.mark.parametrize(("programs", "fp8"), [(1, True), (264, False)])
def test_a_sequence_with_nan_in_its_cache_spoils_itself_and_no_other(
    programs: int, fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(2)
    monkeypatch.setattr(module, "PROGRAMS", programs)
    case = make_case([(40, 1), (65, 12), (3, 2)], 1, 16, 16, torch.float32)
    query = torch.randn(len(case.batch.positions), 4, 16)
    clean = attention(query, in_fp8(case.cache) if fp8 else case.cache, case.batch, None, A100)
    case.cache.keys[case.batch.block_tables[1, 0]] = torch.nan
    spoilt = attention(query, in_fp8(case.cache) if fp8 else case.cache, case.batch, None, A100)
    of_it = slice(case.batch.query_starts_list[1], case.batch.query_starts_list[2])
    assert spoilt[of_it].isnan().all()
    spoilt[of_it] = clean[of_it]
    assert torch.equal(spoilt, clean)


def test_scores_of_any_size_are_survived() -> None:
    torch.manual_seed(3)
    case = make_case(SMALL["mixed"], 2, 32, 16, torch.float32)
    query = torch.randn(len(case.batch.positions), 4, 32) * 1e4
    actual = attention(query, case.cache, case.batch, None, H100)
    # Scores reach 5e4, where float32 has steps of 4e-3: so much of a weight is rounding, where two of them compete.
    torch.testing.assert_close(actual, REFERENCE.attention(query, case.cache, case.batch, None), rtol=0, atol=2e-2)


def test_parts_depend_on_bounds_alone_and_keep_to_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROGRAMS", 528)
    assert count_parts(8, 131072, 2**14, 64, is_few=True) == (64, 64)  # one sequence: as many as may be
    assert count_parts(64, 131072, 2**14, 64, is_few=True) == (8, 32)  # eight fill the card, which one may not
    assert count_parts(8, 64, 2**14, 64, is_few=True) == (1, 1)  # one tile is not cut
    assert count_parts(2048, 1024, 2**22, 64, is_few=True) == (1, 1)  # many sequences fill the card
    assert count_parts(2048, 131072, 2**22, 64, is_few=True) == (1, 16)  # unless one of them may be long
    assert count_parts(2048, 131072, 2**26 + 1, 64, is_few=True) == (1, 1)
    assert count_parts(512, 131072, 2**24, 128, is_few=False) == (1, 1)  # a prompt's chunk fills it
    assert count_parts(16, 131072, 2**20, 128, is_few=False) == (8, 8)  # a short one does not
    assert count_parts(16, 1000, 2**20, 128, is_few=False) == (1, 1)  # parts of few keys would not pay
    assert max(count_parts(n, 10**6, 1, 64, is_few=True)[1] for n in range(1, 300)) == MAX_PARTS
    assert FEW_QUERIES == 8  # drafts and the last token: what the decode kernel is promised for


@pytest.mark.parametrize("capability", [A100, H100])
@pytest.mark.parametrize(("window", "page_size", "dtype"), [(None, 16, BF16), (None, 7, F32), (21, 16, F32)])
def test_prompts_read_codes_that_were_decoded_beforehand(
    capability: tuple[int, int], window: int | None, page_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the sequences from the first prompt on; the others read the codes. Their last pages have one token or more."""
    monkeypatch.setattr(module, "PLAIN_PAGES_FROM", 20)
    torch.manual_seed(41)
    case = make_case([(50, 1), (3, 2), (62, 9), (12, 21)], 2, 32, page_size, torch.float32)
    case.cache.keys.mul_(torch.randn(*case.cache.keys.shape[:3], 1).exp())
    cache, query = in_fp8(case.cache), torch.randn(len(case.batch.positions), 8, 32).to(dtype)
    expected, read = REFERENCE.attention(query, cache, case.batch, window), []
    decode = PlainPages.decode

    def spied(self: PlainPages, *arguments: Any) -> Any:
        read.append(decode(self, *arguments))
        return read[-1]

    monkeypatch.setattr(PlainPages, "decode", spied)
    for limit, steps, there in ((2**20, 2, True), (2**10, 1, False)):
        plain_pages = PlainPages(limit)
        for _ in range(steps):
            actual = attention(query, cache, case.batch, window, capability, plain_pages)
            if dtype == F32:
                assert_close(actual, expected)
            else:  # code times scale is rounded to bfloat16 on its way, by the interpreter cut
                torch.testing.assert_close(actual, expected, rtol=2**-6, atol=2**-4)
            assert (read.pop() is not None) == there
