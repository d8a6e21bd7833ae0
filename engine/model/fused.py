"""All layers of a decoder in one call into layer_kernels.cpp: the loop of `Decoder.forward` without its 240 ways from
Python to a kernel and back, which take as long as the arithmetic of a step for one sequence.

It calls the same kernels in the same order, so that its results are the same to the bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from engine.config import ModelConfig
from engine.model.cache import KVCache
from engine.model.decoder import Layer
from engine.ops import AttentionBatch, Kernels, LayerCache
from engine.ops.cpu import DTYPES
from engine.quant import Linear
from engine.quant.blocked import BlockedLinear


class _Layer(ctypes.Structure):
    """`Layer` of layer_kernels.cpp, field by field."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            *("attention_norm", "qkv", "attention_output", "mlp_norm", "gate_up", "down"),
            *("keys", "values", "key_scales", "value_scales"),
        )
    )


class _Step(ctypes.Structure):
    """`Step` of layer_kernels.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rope_table", "positions", "slots")),
        *((name, ctypes.c_void_p) for name in ("query_starts", "context_lens", "tables")),
        *((name, ctypes.c_int64) for name in ("table_stride", "sequences", "tokens", "hidden", "heads", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("head_dim", "intermediate", "page_size", "window")),
        ("eps", ctypes.c_float),
    )


class FusedLayers:
    """`engine.model.decoder.LayersAtOnce` over the compiled kernels, for contiguous CPU tensors."""

    def __init__(self, kernels: Kernels, layers: Sequence[Layer], config: ModelConfig, rope_table: Tensor) -> None:
        """Use `fuse`, which knows whether the layers can be."""
        self._kernels = kernels
        self._layers = layers
        self._config = config
        self._rope_table = rope_table
        self._cache: KVCache | None = None  # that the table points into
        self._table = (_Layer * len(layers))()

    def __call__(self, x: Tensor, residual: Tensor, cache: KVCache, batch: AttentionBatch) -> Tensor:
        if cache is not self._cache:
            self._table = (_Layer * len(self._layers))(*map(_layer, self._layers, cache.layers))
            self._cache = cache
        config = self._config
        step = _Step(
            self._rope_table.data_ptr(),
            batch.positions.data_ptr(),
            batch.slots.data_ptr(),
            batch.query_starts.data_ptr(),
            batch.context_lens.data_ptr(),
            batch.block_tables.data_ptr(),
            batch.block_tables.stride(0),
            len(batch.context_lens_list),
            len(x),
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.intermediate_size,
            cache.page_size,
            config.sliding_window or 0,
            config.rms_norm_eps,
        )
        self._kernels.library.nemo_layers(
            DTYPES[x.dtype],
            self._table,
            len(self._layers),
            ctypes.byref(step),
            x.data_ptr(),
            residual.data_ptr(),
            self._kernels.threads,
        )
        return x


def fuse(
    kernels: Kernels | None, layers: Sequence[Layer], config: ModelConfig, rope_table: Tensor
) -> FusedLayers | None:
    """The layers as one call, or None where a linear map is more than one product of our kernel."""
    linears = [each for layer in layers for each in (layer.qkv, layer.attention_output, layer.gate_up, layer.down)]
    if kernels is None or any(_address(linear) is None for linear in linears):
        return None
    return FusedLayers(kernels, layers, config, rope_table)


def _address(linear: Linear) -> int | None:
    return linear.address if isinstance(linear, BlockedLinear) else None


def _layer(layer: Layer, pages: LayerCache) -> _Layer:
    tensors = (pages.keys, pages.values, pages.key_scales, pages.value_scales)
    return _Layer(
        layer.attention_norm.data_ptr(),
        _address(layer.qkv),
        _address(layer.attention_output),
        layer.mlp_norm.data_ptr(),
        _address(layer.gate_up),
        _address(layer.down),
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
    )
