"""Operators between the matrix products: `interface` is the seam, `reference` the spec, `cpu` and `triton` the fast
paths."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from engine.ops.cpu import CpuOps
from engine.ops.interface import Activations, AttentionBatch, CodedWeight, LayerCache, Ops, Quantised, Rounding
from engine.ops.native import Kernels, find_compiler, load_kernels
from engine.ops.reference import ReferenceOps, floats

__all__ = [
    "Activations",
    "AttentionBatch",
    "CodedWeight",
    "Kernels",
    "LayerCache",
    "Ops",
    "Quantised",
    "Rounding",
    "find_compiler",
    "floats",
    "load_kernels",
    "select_ops",
]


def select_ops(kernels: Kernels | None, device: torch.device) -> Ops:
    """The fastest there is: compiled kernels on a CPU that has them, Triton on a GPU, else plain torch."""
    if device.type == "cuda" and find_spec("triton") is not None:
        from engine.ops.triton import LEAST_CAPABILITY, TritonOps  # needs Triton, which is not everywhere

        capability = torch.cuda.get_device_capability(device)
        if capability >= LEAST_CAPABILITY:
            return TritonOps(capability)
    return ReferenceOps() if kernels is None else CpuOps(kernels)
