"""Safetensors files: names, types and shapes from their headers, rows of tensors from their bytes.

    u64 length | JSON: name -> {dtype, shape, data_offsets: [begin, end]} | data, tensors back to back

Rows are read into memory of their own (pread) and the file is never mapped. So a process holds what it has asked for
and no more: pages of a mapping count as its resident memory as long as they stay in the page cache. The kernel still
caches what was read; a cgroup counts that as well, but takes it back before it calls memory short. And a file that
shrinks under a mapping kills the process (SIGBUS), while a short read is an error that names it.

Source of the format: huggingface/safetensors, README and `safetensors/src/tensor.rs`, whose checks these are.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import CheckpointError, UnsupportedModelError

FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FP8 = "F8_E4M3"
MATRIX_TYPES = {**FLOAT_TYPES, FP8: torch.float8_e4m3fn}
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the format's own library
_LONGEST_NAME = 256
_DIMENSIONS = 8  # at most, so that a product of them stays a small number
_LARGEST_READ = 2**30  # bytes of one call; Linux moves at most 2 GiB
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: `begin` .. `end` - 1 are its bytes in the file `path`, open as `descriptor`."""

    path: Path
    descriptor: int
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFiles:
    """Several safetensors files seen as one mapping of names; each is opened once.

    Attributes:
        tensors: by name. Their bytes are known to lie in their file, and to be as many as type and shape say.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Raises CheckpointError for a file that is missing, truncated or corrupt, and for a name that stands twice."""
        self._descriptors: list[int] = []
        self.tensors: dict[str, StoredTensor] = {}
        try:
            for path in files:
                self._open(path)
        except BaseException:
            self.close()
            raise

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(
        self, name: str, start: int = 0, stop: int | None = None, types: Mapping[str, torch.dtype] = FLOAT_TYPES
    ) -> Tensor:
        """A tensor, or rows start .. stop - 1 of it.

        Args:
            types: those that it may have.

        Raises:
            CheckpointError: the file has shrunk or cannot be read.
            UnsupportedModelError: it has another type.
        """
        tensor = self.tensors[name]
        dtype = readable_type(name, tensor, types)
        shape = tensor.shape
        if shape:
            start, stop, _ = slice(start, stop).indices(shape[0])
            shape = (max(0, stop - start), *shape[1:])
            row = math.prod(shape[1:]) * dtype.itemsize
            begin = tensor.begin + start * row
        else:
            begin = tensor.begin
        data = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        read_into(data, name, tensor.path, tensor.descriptor, begin)
        return data.view(dtype).view(shape)

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _open(self, path: Path) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would be waited for
            self._descriptors.append(descriptor)
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: not a regular file")
            entries, data = _read_header(path, descriptor, status.st_size)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        found = [_entry(path, descriptor, name, entry, data) for name, entry in entries.items()]
        _check_extents(path, dict(zip(entries, found, strict=True)), data, status.st_size)
        for name, tensor in zip(entries, found, strict=True):
            if name in self.tensors:
                raise CheckpointError(f"{path}: tensor {name} is also in {self.tensors[name].path.name}")
            self.tensors[name] = tensor


def readable_type(name: str, tensor: StoredTensor, types: Mapping[str, torch.dtype]) -> torch.dtype:
    """The type of a tensor that must be one of `types`; raises UnsupportedModelError if it is not."""
    if tensor.dtype not in types:
        raise UnsupportedModelError(
            f"{tensor.path}: tensor {name} has dtype {tensor.dtype}; supported are {', '.join(types)}"
        )
    return types[tensor.dtype]


def _read_header(path: Path, descriptor: int, size: int) -> tuple[dict[str, Any], int]:
    """The entries of the tensors, and the byte at which the data begins."""
    prefix = os.pread(descriptor, 8, 0)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= size - 8:
        raise CheckpointError(f"{path}: not a safetensors file, or truncated: a header of {length} bytes in {size}")
    if length > _LARGEST_HEADER:
        raise CheckpointError(f"{path}: a header of {length} bytes; the format has at most {_LARGEST_HEADER}")
    try:
        header = json.loads(os.pread(descriptor, length, 8).decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: not a safetensors file: its header is not a JSON object")
    header.pop("__metadata__", None)
    return header, 8 + length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _entry(path: Path, descriptor: int, name: str, entry: object, data: int) -> StoredTensor:
    """One tensor of the header, if its type, shape and offsets agree."""
    if not name.isprintable() or len(name) > _LONGEST_NAME:  # it stands in messages
        raise CheckpointError(f"{path}: {name!r:.80} is no name of a tensor")
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if len(
            shape
        ) <= _DIMENSIONS and all(type(number) is int and 0 <= number < 2**63 for number in (*shape, begin, end)):
            pass
        case _:
            raise CheckpointError(f"{path}: tensor {name} has no valid dtype, shape and data_offsets in the header")
    if dtype not in _BITS:
        raise UnsupportedModelError(f"{path}: tensor {name} has the unknown dtype {dtype[:20]}")
    if math.prod(shape) * _BITS[dtype] != 8 * (end - begin):
        raise CheckpointError(f"{path}: tensor {name}, {dtype} {shape}, cannot be the {end - begin} bytes that it has")
    return StoredTensor(path, descriptor, dtype, tuple(shape), data + begin, data + end)


def _check_extents(path: Path, tensors: Mapping[str, StoredTensor], data: int, size: int) -> None:
    """Tensors follow one another, without overlap or gap, from the header to the end of the file."""
    for name, tensor in tensors.items():
        if tensor.end > size:
            raise CheckpointError(f"{path}: truncated: tensor {name} ends at byte {tensor.end}, the file at {size}")
    at = data
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != at:
            fault = "overlaps another" if tensor.begin < at else "follows a gap"
            raise CheckpointError(f"{path}: tensor {name} {fault}: it begins at byte {tensor.begin}, not {at}")
        at = tensor.end
    if at != size:
        raise CheckpointError(f"{path}: {size - at} bytes behind the last tensor belong to none")


def read_into(data: Tensor, name: str, path: Path, descriptor: int, begin: int) -> None:
    """Fill `data` from byte `begin` of the file on.

    Args:
        data: uint8 [bytes].
        name, path: of the tensor and its file, for messages.

    Raises:
        CheckpointError: the file has shrunk or cannot be read.
    """
    memory, done = data.numpy().data, 0
    while done < len(memory):
        try:
            count = os.preadv(descriptor, [memory[done : done + _LARGEST_READ]], begin + done)
        except OSError as error:
            raise CheckpointError(f"{path}: tensor {name} cannot be read: {error.strerror}") from None
        if count == 0:
            raise CheckpointError(f"{path}: truncated while it was read, in tensor {name}")
        done += count
