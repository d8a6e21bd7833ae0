"""The header of a GGUF file: metadata and tensor directory, every length checked before it is believed.

    magic "GGUF" | version u32 | tensors u64 | pairs u64
    pairs x   (key string, type u32, value)                 string = length u64, UTF-8 bytes
    tensors x (name string, dims u32, sizes u64 x dims, type u32, offset u64)
    padding to `general.alignment` | tensor data

Torch-free, so that the process that only wants the tokenizer can read it too. Format: ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_PAIRS = 100_000
_MAX_TENSORS = 100_000
_MAX_DIMS = 4  # of ggml
_LONGEST_NAME = 64  # of ggml
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One entry of the directory. `shape` is in torch's order, outputs first; `offset` is from the file's start."""

    ggml_type: int
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    file_size: int


def read_header(path: Path, wanted: Callable[[str], bool] = lambda key: True) -> GGUFHeader:
    """Metadata for whose keys `wanted` is true (numbers, strings and lists of them), and the tensor directory.

    Raises:
        CheckpointError: the file is missing, truncated or not GGUF.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(data).header(wanted)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, struct.error, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path}: not a readable GGUF file: {error}") from None


class _Cursor:
    """A position in the mapped file. Raises ValueError where the file does not hold what it announces."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def header(self, wanted: Callable[[str], bool]) -> GGUFHeader:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not 2 or 3")
        tensors = self._count("tensors", _MAX_TENSORS)
        pairs = self._count("metadata pairs", _MAX_PAIRS)
        metadata = {}
        for _ in range(pairs):
            key = self._string()
            keep = key == "general.alignment" or wanted(key)
            value = self._value(self._scalar("I"), keep)
            if keep:
                metadata[key] = value
        directory = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment {alignment!r:.60} is not a power of two")
        start = -(-self._at // alignment) * alignment
        named = {name: GGUFTensor(kind, shape, start + offset) for name, kind, shape, offset in directory}
        if len(named) != len(directory):
            raise ValueError("two tensors have the same name")
        return GGUFHeader(metadata, named, len(self._data))

    def _tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string()
        if not name.isprintable() or len(name) > _LONGEST_NAME:  # it stands in messages
            raise ValueError(f"{name!r:.80} is no name of a tensor")
        dims = self._scalar("I")
        if not 1 <= dims <= _MAX_DIMS:
            raise ValueError(f"tensor {name} has {dims} dimensions")
        shape = tuple(reversed([self._scalar("Q") for _ in range(dims)]))
        if not 0 < math.prod(shape) < 2**48:
            raise ValueError(f"tensor {name} has shape {list(shape)}")
        return name, self._scalar("I"), shape, self._scalar("Q")

    def _count(self, what: str, limit: int) -> int:
        count: int = self._scalar("Q")
        if count > limit:
            raise ValueError(f"{count} {what}, more than {limit}")
        return count

    def _take(self, size: int) -> bytes:
        start, self._at = self._at, self._at + size
        if self._at > len(self._data):
            raise ValueError(f"truncated at byte {start}")
        return self._data[start : self._at]

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _string(self) -> str:
        return self._take(self._scalar("Q")).decode("utf-8")

    def _value(self, kind: int, keep: bool) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ValueError(f"metadata type {kind} is unknown")
        element, count = self._scalar("I"), self._scalar("Q")
        if element in _SCALARS:
            code = _SCALARS[element]
            raw = self._take(count * struct.calcsize(f"<{code}"))
            return list(struct.unpack(f"<{count}{code}", raw)) if keep else None
        if element != _STRING:
            raise ValueError(f"metadata arrays of type {element} are not supported")
        if count > len(self._data) // 8:  # a string takes 8 bytes at least
            raise ValueError(f"an array of {count} strings cannot be in a file of {len(self._data)} bytes")
        if keep:
            return [self._string() for _ in range(count)]
        for _ in range(count):
            self._take(self._scalar("Q"))
        return None
