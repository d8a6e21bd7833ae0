"""The operators as slow, obvious torch on any device: the specification that every kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from engine.ops.interface import AttentionBatch


class ReferenceOps:
    """`Ops` in plain torch: one sequence at a time, pages gathered, everything in float32."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        residual.add_(x)
        inverse = torch.rsqrt(residual.square().mean(-1, keepdim=True) + eps)
        return (residual * inverse * weight.float()).to(x.dtype)

    def rope_and_write(
        self, qkv: Tensor, rope_table: Tensor, keys: Tensor, values: Tensor, batch: AttentionBatch
    ) -> Tensor:
        _, kv_heads, page_size, head_dim = keys.shape
        heads = qkv.shape[1] // head_dim - 2 * kv_heads
        query, key, value = torch.split(qkv.view(len(qkv), -1, head_dim), [heads, kv_heads, kv_heads], dim=1)
        rotation = rope_table[batch.positions].unsqueeze(1)
        page, offset = batch.slots // page_size, batch.slots % page_size
        keys[page, :, offset] = rotate(key, rotation)
        values[page, :, offset] = value
        return rotate(query, rotation)

    def attention(
        self, query: Tensor, keys: Tensor, values: Tensor, batch: AttentionBatch, window: int | None
    ) -> Tensor:
        _, kv_heads, page_size, head_dim = keys.shape
        group = query.shape[1] // kv_heads
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for s, context in enumerate(batch.context_lens_list):
            rows = slice(batch.query_starts_list[s], batch.query_starts_list[s + 1])
            pages = batch.block_tables[s, : -(-context // page_size)].long()
            key, value = (
                cache[pages].transpose(0, 1).reshape(kv_heads, -1, head_dim)[:, :context].float()
                for cache in (keys, values)
            )
            q = query[rows].float().view(-1, kv_heads, group, head_dim)
            scores = torch.einsum("qhgd,hkd->hgqk", q, key) * head_dim**-0.5
            position = torch.arange(context - len(q), context, device=query.device).unsqueeze(1)
            past = position - torch.arange(context, device=query.device)  # [queries, keys]: how far back a key lies
            seen = past >= 0 if window is None else (past >= 0) & (past < window)
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            out[rows] = torch.einsum("hgqk,hkd->qhgd", weights, value).reshape(-1, *query.shape[1:]).to(out.dtype)
        return out.flatten(1)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (functional.silu(gate) * up).to(gate_up.dtype)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim/2) of x [T, n, head_dim] by the angles of rotation [T, 1, head_dim]."""
    cos, sin = rotation.chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
