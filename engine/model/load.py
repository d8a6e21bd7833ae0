"""Checkpoint to decoder weights: tensor by tensor, so that the peak is the model itself and one layer more.

A matrix is cast, fused and handed to its format as soon as it is read; the file's copy is gone before the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.face import LoadProgress
from engine.model.decoder import Decoder, Layer, Weights
from engine.model.rope import rope_table
from engine.ops import Kernels, load_kernels, select_ops
from engine.quant import BlockedLinear, DenseLinear, Linear, make_linear


class TensorSource(Protocol):
    """What loading needs of a checkpoint: its configuration, and tensors under Hugging Face's Llama names."""

    @property
    def config(self) -> ModelConfig: ...

    def read(self, name: str) -> Tensor:
        """The tensor, dequantised, rotate-half order. Raises CheckpointError if there is none."""


def load_decoder(
    checkpoint: TensorSource,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    threads: int,
    progress: LoadProgress,
) -> Decoder:
    """Read all weights and build the decoder.

    Args:
        dtype: compute dtype; what the file stores is converted to it.
        max_model_len: positions that the rotary table covers.
        threads: CPU threads of the engine's own kernels.

    Raises:
        CheckpointError: a tensor is missing or has not the shape that the configuration demands.
    """
    config = checkpoint.config
    kernels = load_kernels(threads) if device.type == "cpu" else None
    weights = _Reader(checkpoint, dtype, device, kernels, progress).read()
    return Decoder(config, weights, select_ops(kernels), rope_table(config, max_model_len, device))


class _Reader:
    """Reads the tensors of one checkpoint in order, counting what it has read."""

    def __init__(
        self,
        checkpoint: TensorSource,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels | None,
        progress: LoadProgress,
    ) -> None:
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._dtype, self._device, self._kernels = dtype, device, kernels
        self._progress = progress
        self._parameters = 0
        self._nbytes = 0

    def read(self) -> Weights:
        config = self._config
        embed, head = self._ends()
        layers = []
        for index in range(config.num_layers):
            self._progress("read weights", index / config.num_layers)
            layers.append(self._layer(f"model.layers.{index}."))
        norm = self._tensor("model.norm.weight", (config.hidden_size,))
        self._progress("read weights", 1.0)
        return Weights(embed, layers, norm, head, self._parameters, self._nbytes)

    def _ends(self) -> tuple[Callable[[Tensor], Tensor], Linear]:
        """Embedding and head; one matrix in memory if they are tied."""
        shape = (self._config.vocab_size, self._config.hidden_size)
        table = self._tensor("model.embed_tokens.weight", shape)
        if not self._config.tie_word_embeddings:
            head = make_linear(self._tensor("lm_head.weight", shape), kernels=self._kernels, wide=True)
            self._nbytes += head.nbytes + table.nbytes
            return partial(_look_up, table), head
        head = make_linear(table, kernels=self._kernels, wide=True)
        self._nbytes += head.nbytes
        if isinstance(head, BlockedLinear):
            return head.rows, head
        return partial(_look_up, table), DenseLinear(table, wide=True)

    def _layer(self, prefix: str) -> Layer:
        config = self._config
        hidden, inner, ffn = config.hidden_size, config.q_size, config.intermediate_size
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        qkv = [attention + name for name in ("q_proj", "k_proj", "v_proj")]
        return Layer(
            attention_norm=self._tensor(prefix + "input_layernorm.weight", (hidden,)),
            qkv=self._matrix(qkv, [inner, config.kv_size, config.kv_size], hidden, bias=config.qkv_bias),
            attention_output=self._matrix([attention + "o_proj"], [hidden], inner),
            mlp_norm=self._tensor(prefix + "post_attention_layernorm.weight", (hidden,)),
            gate_up=self._matrix([mlp + "gate_proj", mlp + "up_proj"], [ffn, ffn], hidden),
            down=self._matrix([mlp + "down_proj"], [hidden], ffn),
        )

    def _matrix(self, names: list[str], outputs: list[int], inputs: int, bias: bool = False) -> Linear:
        """One linear map of several matrices over the same input, their outputs one after the other."""
        weights = [self._tensor(name + ".weight", (n, inputs)) for name, n in zip(names, outputs, strict=True)]
        biases = [self._tensor(name + ".bias", (n,)) for name, n in zip(names, outputs, strict=True) if bias]
        return self._linear(torch.cat(weights) if len(weights) > 1 else weights[0], torch.cat(biases) if bias else None)

    def _linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        linear = make_linear(weight, bias, kernels=self._kernels)
        self._nbytes += linear.nbytes
        return linear

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._checkpoint.read(name)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{name}: shape {tuple(tensor.shape)} must be {shape} for this configuration")
        self._parameters += tensor.numel()
        return tensor.to(self._device, self._dtype).contiguous()


def _look_up(table: Tensor, token_ids: Tensor) -> Tensor:
    return table[token_ids]
