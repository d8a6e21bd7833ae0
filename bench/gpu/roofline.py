"""The least time that a step can take on a card, from its shape alone: bytes over copy bandwidth, operations over peak.

    decode    weights once for all rows, keys and values of every row's context
    prefill   2 operations per weight and token, causal attention, the head for the last token alone

Both bounds hold at once, so the later one is the limit. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.gpu.report import CardLimits
from engine.config import ModelConfig
from engine.memory import matrices, token_bytes, weight_bytes
from engine.schemes import Scheme


@dataclass(frozen=True, slots=True)
class Work:
    """What has to be moved and computed.

    Attributes:
        linear_flops: of the projections, in FP8 where `fp8`; `other_flops` of attention and head, in the compute dtype.
    """

    nbytes: float
    linear_flops: float
    other_flops: float
    fp8: bool

    def least_seconds(self, limits: CardLimits) -> float:
        peak = limits.fp8_flops_per_second if self.fp8 else None
        compute = self.linear_flops / (peak or limits.matrix_flops_per_second)
        compute += self.other_flops / limits.matrix_flops_per_second
        return max(self.nbytes / limits.copy_bytes_per_second, compute)


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Of one model in one precision."""

    model: ModelConfig
    scheme: Scheme
    kv_precision: str
    float_bytes: int

    @property
    def streamed_bytes(self) -> int:
        """Of weights that every step reads: all but an embedding table that is not the head as well."""
        whole = weight_bytes(self.model, self.scheme, self.float_bytes)
        if self.model.tie_word_embeddings:
            return whole
        return whole - self.scheme.embedding.nbytes(self.model.vocab_size, self.model.hidden_size, self.float_bytes)

    @property
    def _projections(self) -> int:
        """Weights of all layers."""
        _, *layers, _ = matrices(self.model)
        return sum(each.outputs * each.inputs for each in layers)

    def _attention_flops(self, pairs: float) -> float:
        """Of so many pairs of a query and a key: a product of each with head_dim numbers, and one of its value."""
        return 4.0 * self.model.num_heads * self.model.head_dim * self.model.num_layers * pairs

    def _head_flops(self, rows: int) -> float:
        return 2.0 * self.model.vocab_size * self.model.hidden_size * rows

    @property
    def _token_bytes(self) -> int:
        return token_bytes(self.model, self.kv_precision, self.float_bytes)

    def decode(self, batch: int, context: int) -> Work:
        """One token of each row."""
        return Work(
            nbytes=self.streamed_bytes + batch * context * self._token_bytes,
            linear_flops=2.0 * self._projections * batch,
            other_flops=self._head_flops(batch) + self._attention_flops(batch * context),
            fp8=self.scheme.quantise_inputs,
        )

    def prefill(self, tokens: int, chunk: int) -> Work:
        """A prompt in chunks: each reads the weights, and keys and values of all before it."""
        ends = [min(start + chunk, tokens) for start in range(0, tokens, chunk)]
        return Work(
            nbytes=len(ends) * self.streamed_bytes + sum(ends) * self._token_bytes,
            linear_flops=2.0 * self._projections * tokens,
            other_flops=self._head_flops(1) + self._attention_flops(tokens * (tokens + 1) / 2),
            fp8=self.scheme.quantise_inputs,
        )
