"""Checked access to the keys of a configuration file: the right type, a sane range, or an error that names the key."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError

_LARGEST_SIZE = 2**27  # of any width, count or length in a configuration; beyond it the file is wrong
_LARGEST_FILE = 2**26  # bytes; an index of a hundred thousand tensors has 10 MB


class Fields:
    """A mapping read from `where`. `get`-like methods return the default for an absent or null key, if there is one."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        self.where = where
        self._values = values

    @classmethod
    def of_json(cls, path: Path) -> Fields:
        """The object in a JSON file.

        Raises:
            CheckpointError: the file is missing, too large, or not a JSON object.
        """
        try:
            if (size := path.stat().st_size) > _LARGEST_FILE:
                raise CheckpointError(f"{path}: {size} bytes, more than {_LARGEST_FILE}")
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: not a JSON object")
        return cls(str(path), values)

    def keys(self) -> Iterable[str]:
        return self._values.keys()

    def raw(self, key: str) -> Any:
        """The value as it stands, None if absent."""
        return self._values.get(key)

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST_SIZE:
            raise self.wrong(key, value, f"an integer between 1 and {_LARGEST_SIZE}")
        return value

    def optional_size(self, key: str) -> int | None:
        return None if self._values.get(key) is None else self.size(key)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise self.wrong(key, value, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id or a list of them; empty if absent."""
        value = self._values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
            raise self.wrong(key, value, "a token id or a list of token ids")
        return tuple(ids)

    def child(self, key: str) -> Fields | None:
        """The object under `key`, None if absent."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, value, "an object")
        shown = key if key.isprintable() else _short(key)  # some keys are names from the file
        return Fields(f"{self.where}: {shown}", value)

    def wrong(self, key: str, value: object, expected: str) -> CheckpointError:
        shown = "is missing; it must be" if value is None else f"{_short(value)} must be"
        return CheckpointError(f"{self.where}: {key} {shown} {expected}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
