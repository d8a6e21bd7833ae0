"""Checkpoint to decoder weights: slab by slab, so that the peak is the model itself and one slab more.

A matrix is converted, fused and handed to its format as it is read; the file's copy is gone before the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from engine.checkpoint.layout import expected_tensors
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.face import Done, LoadProgress
from engine.model.decoder import Decoder, Layer, Weights
from engine.model.fused import fuse
from engine.model.rope import rope_table
from engine.ops import load_kernels, select_ops
from engine.quant import Linear, Matrix, Part, Table, Target, build_linear, build_table, find_products, has_fp8_units
from engine.schemes import SCHEMES, Kept, Scheme


class TensorSource(Protocol):
    """What loading needs of a checkpoint: its configuration, and tensors under Hugging Face's Llama names."""

    @property
    def config(self) -> ModelConfig: ...

    def read(self, name: str) -> Tensor:
        """A vector, as floats. Raises CheckpointError if there is none."""

    def matrix(self, name: str, start: int = 0, stop: int | None = None) -> Matrix:
        """Rows of a matrix as stored, rotate-half order. Raises CheckpointError if there is none."""

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor in its file. Raises CheckpointError if there is none."""


def load_decoder(
    checkpoint: TensorSource,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    threads: int,
    progress: LoadProgress,
    scheme: Scheme = SCHEMES["auto"],
    join: Callable[[Weights], Weights] | None = None,
) -> Decoder:
    """Read all weights and build the decoder.

    Args:
        dtype: compute dtype; norms and biases are converted to it.
        max_model_len: positions that the rotary table covers.
        threads: CPU threads of the engine's own kernels.
        scheme: what is made of the matrices.
        join: what a rank makes of its share of the weights (`engine.parallel.layers.join_ranks`); None = they are all.

    Raises:
        CheckpointError: a tensor is missing or has not the shape that the configuration demands.
    """
    config = checkpoint.config
    kernels = load_kernels(threads) if device.type == "cpu" else None
    as_stored = scheme.linear is Kept.STORED
    units = has_fp8_units(device)
    quantise = scheme.quantise_inputs or (as_stored and units)
    target = Target(dtype, device, kernels, quantise, find_products(device), units)
    weights = _Reader(checkpoint, scheme, target, progress).read()
    if join is not None:
        weights = join(weights)
    table = rope_table(config, max_model_len, device)
    return Decoder(config, weights, select_ops(kernels, device), table, fuse(kernels, weights.layers, config, table))


class _Reader:
    """Reads the tensors of one checkpoint in order, telling slab by slab how many bytes of its files it has read."""

    def __init__(self, checkpoint: TensorSource, scheme: Scheme, target: Target, progress: LoadProgress) -> None:
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._scheme, self._target = scheme, target
        self._progress = progress
        self._parameters = 0
        self._nbytes = 0
        self._outputs = {name: shape[0] for name, shape in expected_tensors(self._config).items()}
        self._rows_read: dict[str, int] = {}
        self._bytes_read = 0.0
        self._total_bytes = sum(checkpoint.stored_bytes(name) for name in self._outputs)

    def read(self) -> Weights:
        config = self._config
        self._progress("read weights", Done(0.0, 0, self._total_bytes))
        embedding, head = self._ends()
        layers = [self._layer(f"model.layers.{index}.") for index in range(config.num_layers)]
        norm = self._vector("model.norm.weight", config.hidden_size)
        return Weights(embedding, layers, norm, head, self._parameters, self._nbytes)

    def _ends(self) -> tuple[Table, Linear]:
        """Embedding and head; one matrix in memory if they are tied."""
        vocab, hidden, scheme = self._config.vocab_size, self._config.hidden_size, self._scheme
        tied = self._config.tie_word_embeddings
        embedding = self._part("model.embed_tokens.weight", vocab, hidden)
        table = build_table(embedding, hidden, scheme.head if tied else scheme.embedding, self._target)
        self._nbytes += table.nbytes
        if tied:
            return table, table
        return table, self._linear([self._part("lm_head.weight", vocab, hidden)], hidden, scheme.head, wide=True)

    def _layer(self, prefix: str) -> Layer:
        config = self._config
        hidden, inner, ffn = config.hidden_size, config.q_size, config.intermediate_size
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        qkv = {"q_proj": inner, "k_proj": config.kv_size, "v_proj": config.kv_size}
        return Layer(
            attention_norm=self._vector(prefix + "input_layernorm.weight", hidden),
            qkv=self._projections(attention, qkv, hidden, bias=config.qkv_bias),
            attention_output=self._projections(attention, {"o_proj": hidden}, inner),
            mlp_norm=self._vector(prefix + "post_attention_layernorm.weight", hidden),
            gate_up=self._projections(mlp, {"gate_proj": ffn, "up_proj": ffn}, hidden),
            down=self._projections(mlp, {"down_proj": hidden}, ffn),
        )

    def _projections(self, prefix: str, outputs: dict[str, int], inputs: int, bias: bool = False) -> Linear:
        """One linear map of several matrices over the same input, their outputs one after the other."""
        parts = [self._part(f"{prefix}{name}.weight", count, inputs) for name, count in outputs.items()]
        biases = [self._vector(f"{prefix}{name}.bias", count) for name, count in outputs.items() if bias]
        kept = self._scheme.projection(f"{prefix}{next(iter(outputs))}.weight", self._config.num_layers)
        return self._linear(parts, inputs, kept, torch.cat(biases) if bias else None)

    def _linear(
        self, parts: list[Part], inputs: int, kept: Kept, bias: Tensor | None = None, wide: bool = False
    ) -> Linear:
        linear = build_linear(parts, inputs, kept, self._target, bias=bias, wide=wide)
        self._nbytes += linear.nbytes
        return linear

    def _part(self, name: str, outputs: int, inputs: int) -> Part:
        self._parameters += outputs * inputs
        return Part(partial(self._rows, name, inputs), outputs, name)

    def _rows(self, name: str, inputs: int, start: int, stop: int) -> Matrix:
        matrix = self._checkpoint.matrix(name, start, stop)
        _check_shape(name, matrix.shape, (stop - start, inputs))
        self._count(name, stop)
        return matrix

    def _vector(self, name: str, width: int) -> Tensor:
        tensor = self._checkpoint.read(name)
        _check_shape(name, tuple(tensor.shape), (width,))
        self._count(name, width)
        self._parameters += width
        return tensor.to(self._target.device, self._target.dtype).contiguous()

    def _count(self, name: str, stop: int) -> None:
        """Rows of a tensor up to `stop` have been read; a row that is looked at before its slab counts once."""
        rows = stop - self._rows_read.get(name, 0)
        if rows > 0:
            self._rows_read[name] = stop
            self._bytes_read += self._checkpoint.stored_bytes(name) * rows / self._outputs[name]
            read = round(self._bytes_read)
            self._progress("read weights", Done(read / self._total_bytes, read, self._total_bytes))


def _check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise CheckpointError(f"{name}: shape {shape} must be {expected} for this configuration")
