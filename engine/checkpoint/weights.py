"""A model in safetensors files, whoever published it: tensors under our names, query and key rows in rotate-half order.

Hugging Face's form and Mistral's own differ in what they call a tensor, in the order of query and key rows, and in how
they describe FP8. Their readers say so; everything else is done here, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.fields import Fields
from engine.checkpoint.files import FLOAT_TYPES, MATRIX_TYPES, SafetensorsFiles, readable_type
from engine.checkpoint.fp8 import Fp8Reader, is_scale
from engine.checkpoint.fp8_config import Fp8Claims
from engine.checkpoint.layout import check_tensors, expected_tensors, rotate_half_order, rotate_half_rows
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.quant.matrix import FloatMatrix, Matrix


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a publisher's files are read.

    Attributes:
        rename: their name of a tensor -> ours; None for one that is not of the text model. Unknown names may stay:
            they are refused where all names are checked.
        interleaved: query and key rows are RoPE pairs, not the two halves of rotate-half.
        fp8: what the configuration says of FP8 weights, if it does.
        listed: their names -> file, from an index, which must be true.
    """

    rename: Callable[[str], str | None]
    interleaved: bool = False
    fp8: Fp8Claims | None = None
    listed: dict[str, Path] | None = None


class SafetensorsCheckpoint:
    """One open checkpoint. Names, types, shapes and scales have been checked; reading checks values."""

    def __init__(self, where: Path, files: list[Path], config: ModelConfig, dialect: Dialect) -> None:
        """
        Args:
            where: the folder or file, for messages.
            files: all shards.

        Raises:
            CheckpointError, UnsupportedModelError: name the file and what is wrong with it.
        """
        self.config = config
        self._interleaved = dialect.interleaved
        self._files = SafetensorsFiles(files)
        try:
            self._check_index(dialect)
            self._stored = self._names(dialect)
            shapes = {name: self._files.tensors[stored].shape for name, stored in self._stored.items()}
            check_tensors(str(where), {name: shape for name, shape in shapes.items() if not is_scale(name)}, config)
            expected = expected_tensors(config)
            for name, shape in expected.items():
                stored = self._stored[name]
                readable_type(stored, self._files.tensors[stored], MATRIX_TYPES if len(shape) == 2 else FLOAT_TYPES)
            matrices = {name: (shape[0], shape[1]) for name, shape in expected.items() if len(shape) == 2}
            self._scales = Fp8Reader(self._files, self._stored, dialect.fp8, self._rotate_half).scales(matrices)
        except BaseException:
            self._files.close()
            raise
        self.num_parameters = sum(map(math.prod, expected.values()))

    def read(self, name: str) -> Tensor:
        matrix = self.matrix(name)
        return matrix.values if isinstance(matrix, FloatMatrix) else matrix.dequantise()

    def matrix(self, name: str, start: int = 0, stop: int | None = None) -> Matrix:
        stored = self._stored.get(name)
        if stored is None:
            raise CheckpointError(f"tensor {name} is missing")
        rows = self._rows(name, start, stop)
        if not _is_finite(rows):
            raise CheckpointError(f"{self._files.tensors[stored].path}: tensor {stored} has values that are not finite")
        scales = self._scales.get(name)
        return FloatMatrix(rows) if scales is None else scales.matrix(rows, start)

    def stored_bytes(self, name: str) -> int:
        tensor = self._files.tensors[self._stored[name]]
        return tensor.end - tensor.begin

    def close(self) -> None:
        self._files.close()

    def _rows(self, name: str, start: int, stop: int | None) -> Tensor:
        """As stored but for their order."""
        read = partial(self._files.read, self._stored[name], types=MATRIX_TYPES)
        heads, width = self._heads(name), self.config.head_dim
        if heads is None:
            return read(start, stop)
        return rotate_half_rows(read, start, heads * width if stop is None else stop, width)

    def _rotate_half(self, name: str, rows: Tensor) -> Tensor:
        heads = self._heads(name)
        return rows if heads is None else rotate_half_order(rows, heads, self.config.head_dim)

    def _heads(self, name: str) -> int | None:
        """How many heads a tensor has whose rows are to be reordered."""
        if self._interleaved and ".self_attn.q_proj." in name:
            return self.config.num_heads
        if self._interleaved and ".self_attn.k_proj." in name:
            return self.config.num_kv_heads
        return None

    def _check_index(self, dialect: Dialect) -> None:
        for name, path in (dialect.listed or {}).items():
            if name not in self._files.tensors or self._files.tensors[name].path != path:
                raise CheckpointError(f"{path}: tensor {name} is not in this file, as the index says")

    def _names(self, dialect: Dialect) -> dict[str, str]:
        names: dict[str, str] = {}
        for stored, tensor in self._files.tensors.items():
            name = dialect.rename(stored)
            if name is None:
                continue
            if name in names:
                raise CheckpointError(f"{tensor.path}: tensor {stored} is also there as {names[name]}")
            names[name] = stored
        return names


def read_index(index: Path) -> dict[str, Path] | None:
    """Name of each tensor -> the file of this folder that has it; None if there is no index."""
    if not index.exists():
        return None
    weight_map = Fields.of_json(index).raw("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is not an object of tensor names and files")
    for tensor, name in weight_map.items():
        if not tensor.isprintable():
            raise CheckpointError(f"{index}: weight_map has {tensor!r:.80}, which is no name of a tensor")
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise CheckpointError(f"{index}: weight_map names {name!r:.80}, which is not a file of this folder")
    return {tensor: index.parent / name for tensor, name in weight_map.items()}


def _is_finite(values: Tensor) -> bool:
    """In one or two passes without a copy, at 40 GB/s: 4 to 8 % of loading from a warm page cache, less from disk.

    A sum is finite only if all of it is; that of large numbers may overflow, so what is not is looked at again. NaN of
    e4m3 is 0x7f and 0xff, the greatest signed and the greatest unsigned byte; it has no infinity.
    """
    if values.numel() == 0:
        return True
    if values.dtype == torch.float8_e4m3fn:
        return int(values.view(torch.int8).max()) != 0x7F and int(values.view(torch.uint8).max()) != 0xFF
    return math.isfinite(values.sum()) or all(map(math.isfinite, values.aminmax()))
