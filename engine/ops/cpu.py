"""The operators on a CPU: one call each into cpu_kernels.cpp; the results of `reference.py` without its dispatches."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.ops.interface import AttentionBatch, LayerCache, Rounding
from engine.ops.native import Kernels

DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class CpuOps:
    """`Ops` over the compiled kernels, for contiguous float32 and bfloat16 CPU tensors; keys and values may be e4m3.

    The arguments are what the decoder made itself; shapes are its contract and are not checked on each call. Codes are
    not asked for: the linear kernel of a CPU rounds its input itself.
    """

    replayable = False

    def __init__(self, kernels: Kernels) -> None:
        self._library = kernels.library
        self._threads = kernels.threads

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, rounding: Rounding | None = None
    ) -> Tensor:
        assert rounding is None
        out = torch.empty_like(x)
        self._library.nemo_add_rms_norm(
            DTYPES[x.dtype],
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            *x.shape,
            eps,
            self._threads,
        )
        return out

    def rope_and_write(self, qkv: Tensor, rope_table: Tensor, cache: LayerCache, batch: AttentionBatch) -> Tensor:
        _, kv_heads, page_size, head_dim = cache.keys.shape
        tokens, width = qkv.shape
        heads = width // head_dim - 2 * kv_heads
        self._library.nemo_rope_and_write(
            DTYPES[qkv.dtype],
            qkv.data_ptr(),
            rope_table.data_ptr(),
            *_pointers(cache),
            batch.positions.data_ptr(),
            batch.slots.data_ptr(),
            tokens,
            heads,
            kv_heads,
            head_dim,
            page_size,
            self._threads,
        )
        return qkv.view(tokens, -1, head_dim)[:, :heads]

    def attention(self, query: Tensor, cache: LayerCache, batch: AttentionBatch, window: int | None) -> Tensor:
        _, kv_heads, page_size, head_dim = cache.keys.shape
        tokens, heads, _ = query.shape
        out = query.new_empty(tokens, heads * head_dim)
        self._library.nemo_attention(
            DTYPES[query.dtype],
            query.data_ptr(),
            *_pointers(cache),
            out.data_ptr(),
            batch.query_starts.data_ptr(),
            batch.context_lens.data_ptr(),
            batch.block_tables.data_ptr(),
            query.stride(0),
            batch.block_tables.stride(0),
            len(batch.context_lens_list),
            heads,
            kv_heads,
            head_dim,
            page_size,
            window or 0,
            self._threads,
        )
        return out

    def silu_mul(self, gate_up: Tensor, rounding: Rounding | None = None) -> Tensor:
        assert rounding is None
        tokens, width = gate_up.shape
        out = gate_up.new_empty(tokens, width // 2)
        self._library.nemo_silu_mul(
            DTYPES[gate_up.dtype], gate_up.data_ptr(), out.data_ptr(), tokens, width // 2, self._threads
        )
        return out


def _pointers(cache: LayerCache) -> tuple[int | None, ...]:
    tensors = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    return tuple(None if tensor is None else tensor.data_ptr() for tensor in tensors)
