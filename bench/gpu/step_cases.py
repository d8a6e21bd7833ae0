"""Cases of what lies between the matrices: norm, SwiGLU, rotation and write, and the sampler."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.gpu.attention_cases import PAGE_SIZE, random_batch, random_cache
from bench.gpu.kernels import BF16_TOLERANCE, CODES_TOLERANCE, EXACT, Bench, Case, Named, named, numbers
from engine.ops import LayerCache, Rounding
from engine.ops.reference import ReferenceOps, numbers_of
from engine.request import SamplingParams
from engine.sampling import reference
from engine.sampling.draw import mix, uniform

REFERENCE = ReferenceOps()
EPS = 1e-5
ROUNDINGS = {"": None, " to e4m3": Rounding(None), " to e4m3, one scale": Rounding(0.02)}
# Of each kind one row: greedy, the whole distribution, and every cut.
SAMPLED = (
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(top_k=50, top_p=0.95),
    SamplingParams(temperature=1.5, min_p=0.05),
)


def step_cases(bench: Bench) -> Iterator[Named]:
    """Few tokens as in decode, and as many as one chunk of a prompt has."""
    for tokens in (bench.workload.rows[-2], bench.workload.max_batch_tokens):
        # The CPU's own operators are never asked to round.
        for kind, rounding in ROUNDINGS.items() if bench.triton else [("", None)]:
            yield named(f"add_rms_norm {tokens} tokens{kind}", norm_case, bench, tokens, rounding)
            yield named(f"silu_mul {tokens} tokens{kind}", silu_case, bench, tokens, rounding)
        whole = -(-tokens // PAGE_SIZE) * PAGE_SIZE
        for fp8 in (False, True):
            where = "FP8" if fp8 else "plain"
            yield named(f"rope_and_write {whole} tokens, {where} cache", rope_case, bench, whole, fp8)


def sampler_cases(bench: Bench) -> Iterator[Named]:
    """Against one row's plain description, and a batch for its time."""
    if bench.triton:
        for rows in (len(SAMPLED), bench.workload.batches[-1]):
            yield named(f"sampler {rows} rows of {bench.workload.model.vocab_size:,} logits", sampler_case, bench, rows)


def norm_case(bench: Bench, tokens: int, rounding: Rounding | None) -> Case:
    width = bench.workload.model.hidden_size
    x, residual, weight = (
        bench.randn(tokens, width),
        bench.randn(tokens, width, dtype=torch.float32),
        bench.randn(width),
    )

    def expected() -> list[Tensor]:
        total = residual.clone()
        return [numbers(REFERENCE.add_rms_norm(x, total, weight, EPS, rounding)), total]

    return Case(
        expected,
        run=lambda: bench.ops.add_rms_norm(x, residual, weight, EPS, rounding),
        outputs=lambda result: [numbers(result), residual],
        tolerance=_tolerance(rounding),
        nbytes=x.nbytes + 2 * residual.nbytes + _result_bytes(x, rounding),
    )


def silu_case(bench: Bench, tokens: int, rounding: Rounding | None) -> Case:
    gate_up = bench.randn(tokens, 2 * bench.workload.model.intermediate_size)
    return Case(
        expected=lambda: [numbers(REFERENCE.silu_mul(gate_up, rounding))],
        run=lambda: bench.ops.silu_mul(gate_up, rounding),
        outputs=lambda result: [numbers(result)],
        tolerance=_tolerance(rounding),
        nbytes=gate_up.nbytes + _result_bytes(gate_up[:, : gate_up.shape[1] // 2], rounding),
    )


def rope_case(bench: Bench, tokens: int, fp8: bool) -> Case:
    """The written pages are compared as well as the queries.

    Args:
        tokens: that fill whole pages, so that all of them is written.
    """
    model = bench.workload.model
    batch = random_batch(bench, ((0, tokens),))
    cache = random_cache(bench, batch, fp8)
    qkv = bench.randn(tokens, model.q_size + 2 * model.kv_size)
    angles = torch.rand(tokens, model.head_dim // 2, device=bench.device) * 6
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    pages = batch.slots[::PAGE_SIZE] // PAGE_SIZE

    def outputs(query: Tensor, written: LayerCache = cache) -> list[Tensor]:
        keys = numbers_of(written.keys, written.key_scales, pages)
        return [query, keys, numbers_of(written.values, written.value_scales, pages)]

    def expected() -> list[Tensor]:
        copy = random_cache(bench, batch, fp8)
        return outputs(REFERENCE.rope_and_write(qkv.clone(), table, copy, batch), copy)

    share = model.kv_size / (model.q_size + 2 * model.kv_size)  # of keys, as of values
    return Case(
        expected,
        run=lambda: bench.ops.rope_and_write(qkv, table, cache, batch),
        outputs=outputs,
        tolerance=CODES_TOLERANCE if fp8 else BF16_TOLERANCE,
        nbytes=int(qkv.nbytes * (2 - (share if fp8 else 0))),  # read once, written once: keys and values as codes
    )


def sampler_case(bench: Bench, rows: int) -> Case:
    """The largest logits and the tokens; every row has a seed and a position of its own."""
    from engine.ops.triton.sampler import choose  # needs Triton, which is not everywhere

    vocab = bench.workload.model.vocab_size
    logits = bench.randn(rows, vocab, dtype=torch.float32) * 3
    rng = random.Random(rows)
    params = [SAMPLED[row % len(SAMPLED)] for row in range(rows)]
    seeds, positions = [rng.getrandbits(64) for _ in params], [rng.randrange(10**6) for _ in params]
    compared = range(min(rows, len(SAMPLED)))  # sorting one row in Python takes a while
    table = [(each.temperature, each.top_k, each.top_p, each.min_p) for each in params]
    mixed = [value - 2**64 if value >= 2**63 else value for value in map(mix, seeds)]
    given = partial(torch.tensor, device=bench.device)
    arguments = (given([*range(rows)]), given(positions), given(table, dtype=torch.float64), given(mixed))

    def expected() -> list[Tensor]:
        tokens = [
            reference.chosen(logits[row].tolist(), params[row], uniform(seeds[row], positions[row])) for row in compared
        ]
        return [logits.amax(-1), given(tokens)]

    return Case(
        expected,
        run=lambda: choose(logits, *arguments),
        outputs=lambda result: [result[0], result[1][: len(compared)]],
        tolerance=EXACT,
        nbytes=logits.nbytes,
    )


def _tolerance(rounding: Rounding | None) -> float:
    return BF16_TOLERANCE if rounding is None else CODES_TOLERANCE


def _result_bytes(like: Tensor, rounding: Rounding | None) -> int:
    return like.nbytes if rounding is None else like.numel() + 4 * len(like)
