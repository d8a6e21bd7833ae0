"""Operators between the matrix products: `interface` is the seam, `reference` the spec, `cpu` the fast path."""

from __future__ import annotations

import torch

from engine.ops.cpu import CpuOps
from engine.ops.interface import AttentionBatch, Ops
from engine.ops.native import load_kernels
from engine.ops.reference import ReferenceOps

__all__ = ["AttentionBatch", "Ops", "select_ops"]


def select_ops(device: torch.device, threads: int) -> Ops:
    """The fastest implementation that this machine can run; `threads` is for kernels of our own on a CPU."""
    library = load_kernels() if device.type == "cpu" else None
    return ReferenceOps() if library is None else CpuOps(library, threads)
