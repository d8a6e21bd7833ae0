"""Operators between the matrix products: `interface` is the seam, `reference` the spec, `cpu` and `triton` the fast
paths."""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch

from engine.limits import LEAST_CAPABILITY
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
    "has_kernels",
    "has_triton",
    "load_kernels",
    "select_ops",
    "triton_lacks",
]

log = logging.getLogger(__name__)


def select_ops(kernels: Kernels | None, device: torch.device) -> Ops:
    """The fastest there is: compiled kernels on a CPU that has them, Triton on a GPU, else plain torch."""
    if has_triton(device):
        from engine.ops.triton import TritonOps  # needs Triton, which is not everywhere

        return TritonOps(torch.cuda.get_device_capability(device))
    if device.type == "cuda":
        why = triton_lacks() or f"it is older than compute capability {'.'.join(map(str, LEAST_CAPABILITY))}"
        log.warning("the GPU falls back to plain torch, which is several times slower: %s", why)
    return ReferenceOps() if kernels is None else CpuOps(kernels)


def has_kernels(device: torch.device, threads: int) -> bool:
    """Kernels of our own compute there; else plain torch does."""
    return has_triton(device) if device.type == "cuda" else load_kernels(threads) is not None


def has_triton(device: torch.device) -> bool:
    """The kernels in `triton` compute there."""
    return (
        device.type == "cuda"
        and triton_lacks() is None
        and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
    )


def triton_lacks() -> str | None:
    """What is missing here for kernels on a GPU; None = nothing. Triton compiles a launcher in C for each of them."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "there is no C compiler for Triton (gcc or clang)"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "there is no Python.h for Triton (python3-dev)"
    return None
