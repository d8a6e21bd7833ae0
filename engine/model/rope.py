"""Rotary position embedding as one table, made once: angles, their scaling, cosines and sines.

Everything is float64 until the table is rounded to float32. A float32 angle has steps of 0.008 at position 131,071: the
turn between two neighbours would be off by up to half a degree, differently at each position. The code that models are
trained with does so; what they learn is the turn by a distance, and that is what is exact here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.config import Llama3RopeScaling, ModelConfig

BLOCK = 8192  # positions whose angles are float64 at a time: 4 MiB at head_dim 128


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """theta ** (-2i / head_dim) for i < head_dim / 2, scaled as the checkpoint demands. float64 [head_dim / 2]."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequencies = config.rope_theta**-exponent
    if config.rope_scaling is not None:
        frequencies = scale_llama3(frequencies, config.rope_scaling)
    if config.rope_freq_factors is not None:
        frequencies = frequencies / torch.tensor(config.rope_freq_factors, dtype=torch.float64)
    return frequencies


def scale_llama3(frequencies: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    """Slow down what turns less than once per original context, keep what turns often, blend in between.

    Source: meta-llama/llama-models, models/llama3/model.py, `apply_scaling`.
    """
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = blend.clamp(0.0, 1.0)
    return frequencies * keep + frequencies / scaling.factor * (1.0 - keep)


def rope_table(config: ModelConfig, positions: int, device: torch.device) -> Tensor:
    """float32 [positions, head_dim]: cosines in the first half of a row, sines in the second."""
    frequencies = inverse_frequencies(config)
    table = torch.empty(positions, config.head_dim)
    for start in range(0, positions, BLOCK):
        stop = min(start + BLOCK, positions)
        angles = torch.outer(torch.arange(start, stop, dtype=torch.float64), frequencies)
        table[start:stop] = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return table.to(device)
