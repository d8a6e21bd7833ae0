"""Operators between the matrix products: `interface` is the seam, `reference` the spec, `cpu` the fast path."""

from __future__ import annotations

from engine.ops.cpu import CpuOps
from engine.ops.interface import AttentionBatch, LayerCache, Ops
from engine.ops.native import Kernels, find_compiler, load_kernels
from engine.ops.reference import ReferenceOps

__all__ = ["AttentionBatch", "Kernels", "LayerCache", "Ops", "find_compiler", "load_kernels", "select_ops"]


def select_ops(kernels: Kernels | None) -> Ops:
    """The fastest implementation there is: compiled kernels on a CPU that has them, else plain torch on any device."""
    return ReferenceOps() if kernels is None else CpuOps(kernels)
