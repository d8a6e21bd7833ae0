"""One file over HTTP: resumed where it broke off, checked against its sha256, and never taken for whole before.

TARGET.partial grows ──► size and sha256 right ──► fsync ──► renamed to TARGET

The checksum is pinned, so a resumed file that changed on the server meanwhile is refused like any other wrong one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from service.models.errors import StoreError

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

ATTEMPTS = 5  # in a row without a single byte of progress
BACKOFF_SECONDS = 1.0
PASSING = (429, 500, 502, 503, 504)  # statuses that a later attempt may not meet


def download(client: httpx.Client, url: str, target: Path, *, sha256: str, num_bytes: int, progress: Progress) -> None:
    """Fetch `url` into `target`.

    Raises:
        StoreError: the server refuses, the network stays down, the disk is full, or the content is not the one pinned.
    """
    partial = target.with_name(target.name + ".partial")
    ensure_space(target.parent, num_bytes - _size(partial))
    most, failures = _size(partial), 0
    while _size(partial) < num_bytes:
        try:
            trouble = _attempt(client, url, partial, num_bytes, progress)
        except OSError as error:
            raise disk_error(partial, num_bytes - _size(partial), error) from None
        done = _size(partial)
        failures = 0 if done > most else failures + 1
        most = max(most, done)
        if failures == ATTEMPTS:
            raise StoreError(f"{shown(url)}: {trouble}; what has arrived is kept, try again")
        if done < num_bytes:
            time.sleep(BACKOFF_SECONDS * 2**failures)
    verify(partial, sha256)
    commit(partial, target)


def _attempt(client: httpx.Client, url: str, partial: Path, num_bytes: int, progress: Progress) -> str:
    """Add what the server sends; says what went wrong if that was not the rest of the file."""
    try:
        _append(client, url, partial, _size(partial), num_bytes, progress)
    except httpx.HTTPStatusError as error:
        code = error.response.status_code
        if code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            partial.unlink()  # what is here is longer than the server's file, so it is not the beginning of it
        elif code not in PASSING:
            raise StoreError(f"{shown(url)}: the server answers {code}") from None
        return f"the server answers {code}"
    except httpx.TransportError as error:
        return str(error) or type(error).__name__
    return f"the answer ends before byte {num_bytes}"


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
        raise StoreError(f"{path.name}: sha256 is {found}, expected {sha256}; the file was removed, try again")


def commit(partial: Path, target: Path) -> None:
    """Give a verified file its name; after a crash it is whole or not there."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, target)


def ensure_space(folder: Path, num_bytes: int) -> None:
    """Raise StoreError now rather than when the disk is full."""
    if (free := shutil.disk_usage(folder).free) < num_bytes:
        raise StoreError(
            f"{folder}: {num_bytes:,} more bytes are needed and {free:,} are free; "
            "make room or set NEMOSERVE_CACHE to a larger disk"
        )


def disk_error(path: Path, missing: int, error: OSError) -> StoreError:
    """An OSError of writing, in words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            f"{path.parent}: no space left, {missing:,} more bytes are needed; "
            "make room or set NEMOSERVE_CACHE to a larger disk"
        )
    return StoreError(f"{path}: {error.strerror or error}")


def shown(url: str) -> str:
    """A URL as messages may have it: without the password of a private index."""
    return str(httpx.URL(url).copy_with(userinfo=b""))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
