"""The memory of keys and values: pages of tokens, per layer, as `engine.ops.interface` draws them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import ModelConfig


@dataclass(frozen=True, slots=True)
class KVCache:
    """keys[layer], values[layer]: [num_pages, kv_heads, page_size, head_dim]. Page owners are known elsewhere."""

    keys: list[Tensor]
    values: list[Tensor]
    page_size: int

    @classmethod
    def allocate(
        cls, config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """Contents are undefined: the operators read no position before it was written."""
        shape = (2, config.num_layers, num_pages, config.num_kv_heads, page_size, config.head_dim)
        keys, values = torch.empty(shape, dtype=dtype, device=device)
        return cls(list(keys), list(values), page_size)
