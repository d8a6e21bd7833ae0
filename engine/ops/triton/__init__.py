"""The operators on CUDA: one Triton kernel or two for each, the results of `reference.py` at the card's own speed.

A file holds a kernel and a launcher of the signature of `Ops`. Configurations are tables worked out beforehand: nothing
is tuned when a server starts. Importing this needs Triton, which CUDA builds of torch bring; `engine.ops` does not.
"""

from __future__ import annotations

from torch import Tensor

from engine.limits import PLAIN_PAGES
from engine.ops.interface import Activations, AttentionBatch, LayerCache, Rounding
from engine.ops.triton.activation import silu_mul
from engine.ops.triton.attention import attention
from engine.ops.triton.norm import add_rms_norm
from engine.ops.triton.pages import PlainPages
from engine.ops.triton.rope import rope_and_write


class TritonOps:
    """`Ops` over Triton kernels, for contiguous CUDA tensors; keys and values may be e4m3.

    The arguments are what the decoder made itself; shapes are its contract and are not checked on each call.
    """

    replayable = True

    def __init__(self, capability: tuple[int, int]) -> None:
        """
        Args:
            capability: of the card, (9, 0) for an H100; `engine.limits.LEAST_CAPABILITY` or later.
        """
        self._capability = capability
        self._plain_pages = PlainPages(PLAIN_PAGES)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, rounding: Rounding | None = None
    ) -> Activations:
        return add_rms_norm(x, residual, weight, eps, rounding)

    def rope_and_write(self, qkv: Tensor, rope_table: Tensor, cache: LayerCache, batch: AttentionBatch) -> Tensor:
        return rope_and_write(qkv, rope_table, cache, batch)

    def attention(self, query: Tensor, cache: LayerCache, batch: AttentionBatch, window: int | None) -> Tensor:
        return attention(query, cache, batch, window, self._capability, self._plain_pages)

    def silu_mul(self, gate_up: Tensor, rounding: Rounding | None = None) -> Activations:
        return silu_mul(gate_up, rounding)
