"""What the weights of a checkpoint will take in memory, from one row of each matrix: before minutes of reading them."""

from __future__ import annotations

from functools import partial

import torch

from engine.memory import Matrix, weight_bytes
from engine.model.load import TensorSource
from engine.quant.build import Part, Target, form_of
from engine.schemes import Kept, Scheme


def checkpoint_bytes(checkpoint: TensorSource, scheme: Scheme, dtype: torch.dtype) -> int:
    """Bytes of all weights once `load_decoder` has read them with the same scheme and compute dtype."""

    def of_stored(matrix: Matrix, kept: Kept) -> int:
        return matrix_bytes(checkpoint, matrix, kept, dtype)

    return weight_bytes(checkpoint.config, scheme, dtype.itemsize, of_stored)


def matrix_bytes(checkpoint: TensorSource, matrix: Matrix, kept: Kept, dtype: torch.dtype) -> int:
    """Bytes of one matrix, kept so."""
    target = Target(dtype, torch.device("cpu"), None)
    part = Part(partial(checkpoint.matrix, matrix.name), matrix.outputs)
    return form_of(part, kept, target).nbytes(matrix.outputs, matrix.inputs, dtype.itemsize)
