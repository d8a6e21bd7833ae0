"""The dense Mistral/Llama decoder, once, as the papers have it.

    x ── embed ──►( +attention(norm) ──► +SwiGLU(norm) )× layers ──► norm ──► head ──► logits

Mistral 7B (arXiv 2310.06825), Llama 3 (arXiv 2407.21783), NeMo and Qwen2 are this decoder with other numbers:
head_dim is independent of hidden_size / num_heads, QKV may have a bias, the head may be the embedding matrix,
attention may have a window. What differs by hardware is in `ops`, what differs by weight format in `quant`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.model.cache import KVCache
from engine.ops import AttentionBatch, Ops, floats
from engine.quant import Linear, Table


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one block. qkv and gate_up are fused along their outputs, in this order."""

    attention_norm: Tensor
    qkv: Linear
    attention_output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Weights:
    """All parameters of a decoder.

    Attributes:
        embedding: rows [hidden_size] by token id.
        head: [T, hidden_size] -> float32 [T, vocab_size].
        parameters, nbytes: how many there are, and what they take; a tied head counts once.
    """

    embedding: Table
    layers: list[Layer]
    norm: Tensor
    head: Linear
    parameters: int
    nbytes: int


LayersAtOnce = Callable[[Tensor, Tensor, KVCache, AttentionBatch], Tensor]
"""The loop of `Decoder.forward` in one call: x (overwritten), residual, cache and batch to the last layer's x."""


class Decoder:
    """Runs the tokens of a step through all layers, reading and extending the KV cache in place.

    Args:
        at_once: how a back end does all layers, to the same bits; None = one operator after the other.
    """

    def __init__(
        self, config: ModelConfig, weights: Weights, ops: Ops, rope_table: Tensor, at_once: LayersAtOnce | None = None
    ) -> None:
        self.config = config
        self.weights = weights
        self.dtype, self.device = weights.norm.dtype, weights.norm.device
        self._ops = ops
        self._rope_table = rope_table
        self._at_once = at_once
        self.replayable = ops.replayable and at_once is None

    def over(self, weights: Weights) -> Decoder:
        """The same decoder over other weights, one operator after the other."""
        return Decoder(self.config, weights, self._ops, self._rope_table)

    def forward(
        self, token_ids: Tensor, batch: AttentionBatch, cache: KVCache, layers: Sequence[Layer] | None = None
    ) -> Tensor:
        """Hidden states after the last norm.

        Args:
            token_ids: int64 [T].
            batch: where those tokens stand.
            layers: instead of the model's own: with the adapters of this step around them.

        Returns:
            [T, hidden_size] in the compute dtype.
        """
        ops, eps, window = self._ops, self.config.rms_norm_eps, self.config.sliding_window
        x = self.weights.embedding.rows(token_ids).to(self.dtype)
        residual = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        if layers is None and self._at_once is not None:
            x = self._at_once(x, residual, cache, batch)
            return floats(ops.add_rms_norm(x, residual, self.weights.norm, eps))
        layers = self.weights.layers if layers is None else layers
        for layer, pages in zip(layers, cache.layers, strict=True):
            normed = ops.add_rms_norm(x, residual, layer.attention_norm, eps, layer.qkv.rounding)
            query = ops.rope_and_write(layer.qkv(normed), self._rope_table, pages, batch)
            x = layer.attention_output(ops.attention(query, pages, batch, window))

            normed = ops.add_rms_norm(x, residual, layer.mlp_norm, eps, layer.gate_up.rounding)
            x = layer.down(ops.silu_mul(layer.gate_up(normed), layer.down.rounding))
        return floats(ops.add_rms_norm(x, residual, self.weights.norm, eps))

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Scores of the next token after the given rows of `hidden`: float32 [len(rows), vocab_size]."""
        return self.weights.head(hidden[rows])
