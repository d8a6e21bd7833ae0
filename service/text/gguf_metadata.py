"""Metadata of a GGUF file without its tensors: the tokenizer's fields, in a fraction of a second and without torch.

Every length is checked against the size of the file before it is believed. Format: ggml-org/ggml, docs/gguf.md.

    magic "GGUF" | version u32 | tensors u64 | pairs u64 | pairs x (key string, type u32, value) | …
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import CheckpointError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_PAIRS = 100_000


def read_metadata(path: Path, wanted: Callable[[str], bool]) -> dict[str, Any]:
    """Values of the metadata keys for which `wanted` is true; numbers, strings and lists of them.

    Raises:
        CheckpointError: the file is missing, truncated or not GGUF.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).pairs(wanted)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, struct.error) as error:
        raise CheckpointError(f"{path}: not a readable GGUF file: {error}") from None


class _Reader:
    """A cursor over the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def pairs(self, wanted: Callable[[str], bool]) -> dict[str, Any]:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version, _, count = self._scalar("I"), self._scalar("Q"), self._scalar("Q")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not 2 or 3")
        if count > _MAX_PAIRS:
            raise ValueError(f"{count} metadata pairs, more than {_MAX_PAIRS}")
        found = {}
        for _ in range(count):
            key = self._string()
            value = self._value(self._scalar("I"), keep := wanted(key))
            if keep:
                found[key] = value
        return found

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
