"""The seam between the decoder and the hardware: four fused operators over a paged key/value cache.

    qkv = W·norm(x) ──rope_and_write──► query, and K/V in pages ──attention──► mixed heads
                                                                 add_rms_norm, silu_mul: what lies between the matrices

One page of one kv head is a contiguous tile [page_size, head_dim]; a sequence owns pages through its block table:

    keys, values   [num_pages, kv_heads, page_size, head_dim]          block_tables[s] = [7, 2, 9, …]
    position p of sequence s lives in page block_tables[s, p // page_size] at offset p % page_size

In FP8 a vector of head_dim numbers is e4m3 codes and a scale of its own, taken as it is written: no calibration, and a
head or token of large numbers costs no other its precision. Keys are quantised as they are read: after their rotation.

    scales         [num_pages, kv_heads, page_size]                    vector ≈ codes * scale, largest code 448

Invariants that every implementation keeps and the tests compare with `reference.py`:
- in each layer the keys and values of all tokens of a step are written before any is read: a sequence may have pages
  that another one fills in the same step;
- a cache position at or beyond a sequence's context length is never read (it may hold anything, NaN included);
- arithmetic is float32, storage is the dtype of the tensors (rotated keys are not rounded to it before they are codes);
- a row's result does not depend on which other rows are in the batch, beyond float32 rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where the T new tokens of S sequences stand in one step. Tokens of a sequence are consecutive, oldest first.

    Attributes:
        positions: int64 [T], position of each token in its sequence.
        slots: int64 [T], page * page_size + offset where its key and value go. In a recorded step, and nowhere else, -1
            of padding: it is not written.
        query_starts: int32 [S + 1], first token of each sequence; the last entry is T, or where padding begins.
        context_lens: int32 [S], tokens in the cache once this step's are written; the new ones are the last of them.
        block_tables: int32 [S, >= pages in use], pages of each sequence.
        max_query_len, max_context_len: the largest of each over the batch.
        query_starts_list, context_lens_list: the same numbers for host code.
    """

    positions: Tensor
    slots: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    max_query_len: int
    max_context_len: int
    query_starts_list: list[int]
    context_lens_list: list[int]


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer, as drawn above.

    Attributes:
        keys, values: in the compute dtype, or float8_e4m3fn.
        key_scales, value_scales: float32, of codes; None of floats. Where a vector is not all finite, nor is its scale.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @property
    def nbytes(self) -> int:
        tensors = (self.keys, self.values, self.key_scales, self.value_scales)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(frozen=True, slots=True)
class Rounding:
    """What FP8 weights want of their input: e4m3 codes, and a scale of each token's own, or `scale` for all of them."""

    scale: float | None


@dataclass(frozen=True, slots=True)
class Quantised:
    """Activations as matrix units of FP8 take them: x ≈ codes * scales.

    Attributes:
        codes: float8_e4m3fn [T, width].
        scales: float32 [T]; where a token is not all finite, its codes or its scale are not numbers.
        dtype: that x had, and that products get.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.codes)


Activations = Tensor | Quantised


@dataclass(frozen=True, slots=True)
class CodedWeight:
    """A weight matrix [outputs, inputs] in codes, as GPU kernels read it: weight = (codes - zero) * scales - mins.

        e4m3           codes [outputs, inputs], zero 0                             rows along the inputs, as matrix
                                                                                   units of FP8 want them
        8 bits         codes [inputs, outputs], zero 128                           along the outputs, so that the few
        4, 5, 6 bits   codes [inputs / 2, outputs] and, above the fourth bit,      inputs of a group are whole lines
                       high [inputs * (bits - 4) / 8, outputs]; zero 32 at 6 bits  of memory

    Of each 32 inputs, byte j of 16 has the lower bits of input j in its lower half and those of input 16 + j in its
    upper half; byte i % m of the m = 4 * (bits - 4) in the high plane has the others of input i, at bit
    (i // m) * (bits - 4).

    Attributes:
        codes: float8_e4m3fn or uint8. high: uint8, of 5 and 6 bits.
        scales, mins: float32 or float16 [groups, outputs]; mins of 4 and 5 bits.
        bits: 0 (e4m3), 4, 5, 6 or 8.
        group: inputs per scale; 0 = all of an output.
    """

    codes: Tensor
    high: Tensor | None
    scales: Tensor
    mins: Tensor | None
    bits: int
    group: int
    outputs: int
    inputs: int


class Ops(Protocol):
    """What a device must offer. Tensors of a call share one floating dtype unless said otherwise; x is [T, width]."""

    replayable: bool  # launches can be recorded: lengths are read from tensors, and a slot of -1 is not written

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, rounding: Rounding | None = None
    ) -> Activations:
        """Adds x to `residual` in place and returns residual / rms(residual) * weight (arXiv 1910.07467), in x's dtype.

        Args:
            residual: float32 [T, width]. Kept wide, the sum of all layers loses nothing: in bfloat16 this alone halves
                the divergence from a float32 model.
            rounding: what the linear map behind it wants; the result is then that tensor quantised. None = a tensor.
        """

    def rope_and_write(self, qkv: Tensor, rope_table: Tensor, cache: LayerCache, batch: AttentionBatch) -> Tensor:
        """Rotates queries and keys (rotate-half, arXiv 2104.09864) and stores keys and values at `batch.slots`.

        Args:
            qkv: [T, (heads + 2 * kv_heads) * head_dim]; its contents are undefined afterwards.
            rope_table: float32 [positions, head_dim], cosines in the first half of a row, sines in the second.

        Returns:
            rotated queries [T, heads, head_dim], possibly a view of qkv.
        """

    def attention(self, query: Tensor, cache: LayerCache, batch: AttentionBatch, window: int | None) -> Tensor:
        """Causal grouped-query attention of every new token over its sequence's cache, scaled by head_dim ** -0.5.

        Args:
            query: [T, heads, head_dim], rows may be strided.
            window: a token sees itself and the window - 1 tokens before it; None = all before it.

        Returns:
            [T, heads * head_dim].
        """

    def silu_mul(self, gate_up: Tensor, rounding: Rounding | None = None) -> Activations:
        """silu(gate) * up of [T, 2 * width] = gate | up (SwiGLU, arXiv 2002.05202); [T, width], rounded likewise."""
