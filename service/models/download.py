"""One file over HTTP: resumed where it broke off, checked against its sha256, and never taken for whole before.

TARGET.partial grows ──► size and sha256 right ──► fsync ──► renamed to TARGET
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from service.models.errors import StoreError

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

ATTEMPTS = 5  # in a row without a single byte of progress
BACKOFF_SECONDS = 1.0


def download(client: httpx.Client, url: str, target: Path, *, sha256: str, num_bytes: int, progress: Progress) -> None:
    """Fetch `url` into `target`.

    Raises:
        StoreError: the server refuses, the network stays down, the disk is full, or the content is not the one pinned.
    """
    partial = target.with_name(target.name + ".partial")
    failures = 0
    while (done := _size(partial)) < num_bytes:
        try:
            _append(client, url, partial, done, num_bytes, progress)
        except httpx.HTTPStatusError as error:
            raise StoreError(f"{url}: the server answers {error.response.status_code}") from None
        except httpx.TransportError as error:
            failures = 0 if _size(partial) > done else failures + 1
            if failures == ATTEMPTS:
                raise StoreError(
                    f"{url}: {error or type(error).__name__}; what has arrived is kept, try again"
                ) from None
            time.sleep(BACKOFF_SECONDS * 2**failures)
        except OSError as error:
            raise disk_error(partial, num_bytes - _size(partial), error) from None
    verify(partial, sha256)
    commit(partial, target)


def _append(client: httpx.Client, url: str, partial: Path, done: int, num_bytes: int, progress: Progress) -> None:
    """Add what the server sends from byte `done` on; from the start if it does not know ranges."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    with client.stream("GET", url, headers=headers) as response:
        response.raise_for_status()
        resumed = response.status_code == httpx.codes.PARTIAL_CONTENT
        with partial.open("ab" if resumed else "wb") as file:
            for chunk in response.iter_raw():  # as it arrives, so that a break loses nothing
                file.write(chunk)
                progress(min(file.tell(), num_bytes), num_bytes)
                if file.tell() > num_bytes:
                    return  # longer than it may be; the checksum will say so


def verify(path: Path, sha256: str) -> None:
    """Remove the file and raise StoreError unless it has this checksum."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        path.unlink()
        raise StoreError(f"{path.name}: sha256 is {found}, expected {sha256}; the file was removed")


def commit(partial: Path, target: Path) -> None:
    """Give a verified file its name; after a crash it is whole or not there."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, target)


def disk_error(path: Path, missing: int, error: OSError) -> StoreError:
    """An OSError of writing, in words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(f"{path.parent}: no space left; {missing} more bytes are needed")
    return StoreError(f"{path}: {error.strerror or error}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
