"""Small files of an owner's, read whole and looked at again: keys and certificates."""

from __future__ import annotations

import os
from pathlib import Path

from service.security.errors import SecurityError

MAX_FILE_BYTES = 2**20  # keys of a thousand tenants, or the CA certificates of the whole web

Version = tuple[int, int, int] | None


def read_file(path: Path) -> bytes:
    """Raises SecurityError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SecurityError(f"{path}: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise SecurityError(f"{path}: must have at most {MAX_FILE_BYTES} bytes")
    return data


def version_of(path: Path) -> Version:
    """Changes when the file does; None without one. Of a link it is the file that it leads to."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
