"""The memory of keys and values: pages of tokens, per layer, as `engine.ops.interface` draws them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.ops import LayerCache


@dataclass(frozen=True, slots=True)
class KVCache:
    """The pages of all layers. Who owns which is known elsewhere."""

    layers: list[LayerCache]
    page_size: int

    @classmethod
    def allocate(
        cls, config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """Contents are undefined: the operators read no position before it was written.

        Args:
            dtype: of the model, or float8_e4m3fn: then each vector has a scale.
        """
        shape = (config.num_layers, num_pages, config.num_kv_heads, page_size)

        def pages(*width: int, dtype: torch.dtype) -> list[Tensor]:
            return list(torch.empty((*shape, *width), dtype=dtype, device=device))

        numbers = [pages(config.head_dim, dtype=dtype) for _ in range(2)]
        scales = [pages(dtype=torch.float32) for _ in range(2)] if dtype == torch.float8_e4m3fn else []
        return cls([LayerCache(*tensors) for tensors in zip(*numbers, *scales, strict=True)], page_size)
