"""The operators as slow, obvious torch on any device: the specification that every kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from engine.limits import SCORE_SLAB
from engine.ops.interface import Activations, AttentionBatch, LayerCache, Quantised, Rounding
from engine.schemes import E4M3_MAX, LEAST_SCALE


class ReferenceOps:
    """`Ops` in plain torch: one sequence at a time, pages gathered, everything in float32."""

    replayable = False

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, rounding: Rounding | None = None
    ) -> Activations:
        residual.add_(x)
        inverse = torch.rsqrt(residual.square().mean(-1, keepdim=True) + eps)
        return rounded((residual * inverse * weight.float()).to(x.dtype), rounding)

    def rope_and_write(self, qkv: Tensor, rope_table: Tensor, cache: LayerCache, batch: AttentionBatch) -> Tensor:
        _, kv_heads, page_size, head_dim = cache.keys.shape
        heads = qkv.shape[1] // head_dim - 2 * kv_heads
        query, key, value = torch.split(qkv.view(len(qkv), -1, head_dim), [heads, kv_heads, kv_heads], dim=1)
        rotation = rope_table[batch.positions].unsqueeze(1)
        page, offset = batch.slots // page_size, batch.slots % page_size
        written = ((rotate(key, rotation), cache.keys, cache.key_scales), (value, cache.values, cache.value_scales))
        for numbers, pages, scales in written:
            if scales is None:
                pages[page, :, offset] = numbers.to(pages.dtype)
            else:
                codes, scales[page, :, offset] = quantise(numbers)
                pages.view(torch.uint8)[page, :, offset] = codes.view(torch.uint8)  # as bytes: see `numbers_of`
        return rotate(query, rotation).to(query.dtype)

    def attention(self, query: Tensor, cache: LayerCache, batch: AttentionBatch, window: int | None) -> Tensor:
        _, kv_heads, page_size, head_dim = cache.keys.shape
        group = query.shape[1] // kv_heads
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for s, context in enumerate(batch.context_lens_list):
            rows = slice(batch.query_starts_list[s], batch.query_starts_list[s + 1])
            pages = batch.block_tables[s, : -(-context // page_size)].long()
            key = gather(cache.keys, cache.key_scales, pages)[:, :context]
            value = gather(cache.values, cache.value_scales, pages)[:, :context]
            step = max(1, SCORE_SLAB // (query.shape[1] * context))  # queries at a time: scores must not outgrow memory
            for first in range(rows.start, rows.stop, step):
                some = slice(first, min(first + step, rows.stop))
                q = query[some].float().view(-1, kv_heads, group, head_dim)
                scores = torch.einsum("qhgd,hkd->hgqk", q * head_dim**-0.5, key)
                begin = context - (rows.stop - first)  # position of the first of these queries
                position = torch.arange(begin, begin + len(q), device=query.device).unsqueeze(1)
                past = position - torch.arange(context, device=query.device)  # [queries, keys]: how far back a key lies
                seen = past >= 0 if window is None else (past >= 0) & (past < window)
                weights = scores.masked_fill_(~seen, -torch.inf).softmax(-1)
                out[some] = torch.einsum("hgqk,hkd->qhgd", weights, value).reshape(-1, *query.shape[1:]).to(out.dtype)
        return out.flatten(1)

    def silu_mul(self, gate_up: Tensor, rounding: Rounding | None = None) -> Activations:
        gate, up = gate_up.float().chunk(2, dim=-1)
        return rounded((functional.silu(gate) * up).to(gate_up.dtype), rounding)


def rounded(x: Tensor, rounding: Rounding | None) -> Activations:
    return x if rounding is None else quantise_tokens(x, rounding)


def quantise_tokens(x: Tensor, rounding: Rounding) -> Quantised:
    """x [T, width] as codes, each token's largest number at 448 or all with one scale."""
    numbers = x.float()
    if rounding.scale is None:
        scales = (numbers.abs().amax(dim=-1) / E4M3_MAX).clamp(min=LEAST_SCALE)
    else:
        scales = torch.full((len(x),), rounding.scale, device=x.device)
    codes = (numbers * scales.reciprocal().unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX)
    return Quantised(codes.to(torch.float8_e4m3fn), scales, x.dtype)


def floats(x: Activations) -> Tensor:
    """[T, width] in the compute dtype, for a linear map that takes no codes."""
    return x if isinstance(x, Tensor) else (x.codes.float() * x.scales.unsqueeze(-1)).to(x.dtype)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x [T, n, head_dim], its pairs (i, i + head_dim/2) rotated by the angles of rotation [T, 1, head_dim]; float32."""
    cos, sin = rotation.chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., head_dim] ≈ codes * scale: float8_e4m3fn, and float32 [...]. The least scale is the least normal number,
    so that vectors of zeros are safe."""
    x = x.float()
    scale = (x.abs().amax(-1) / E4M3_MAX).clamp(min=LEAST_SCALE)
    return (x / scale.unsqueeze(-1)).to(torch.float8_e4m3fn), scale


def numbers_of(stored: Tensor, scales: Tensor | None, pages: Tensor) -> Tensor:
    """Keys or values of some pages, in float32."""
    if scales is None:
        return stored[pages].float()
    codes = stored.view(torch.uint8)[pages].view(stored.dtype)  # gathered as bytes: CUDA gathers no float8
    return codes.float() * scales[pages].unsqueeze(-1)


def gather(stored: Tensor, scales: Tensor | None, pages: Tensor) -> Tensor:
    """Keys or values of one sequence in order: float32 [kv_heads, len(pages) * page_size, head_dim]."""
    return numbers_of(stored, scales, pages).transpose(0, 1).flatten(1, 2)
