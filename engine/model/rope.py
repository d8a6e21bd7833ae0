"""Rotary position embedding as one table, made once: angles, their scaling, cosines and sines.

Frequencies and angles are float32, as in the code that the models were trained with: at position 100,000 a float64
angle is a different (better) number than the one the weights have learnt.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.config import Llama3RopeScaling, ModelConfig


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """theta ** (-2i / head_dim) for i < head_dim / 2, scaled as the checkpoint demands. float32 [head_dim / 2]."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponent)
    if config.rope_scaling is not None:
        frequencies = scale_llama3(frequencies, config.rope_scaling)
    if config.rope_freq_factors is not None:
        frequencies = frequencies / torch.tensor(config.rope_freq_factors, dtype=torch.float32)
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
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), inverse_frequencies(config))
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)
