"""One file over HTTP: resumed where it broke off, checked against its checksum, and never taken for whole before.

TARGET.partial grows ──► size and checksum right ──► fsync ──► renamed to TARGET

The checksum is known beforehand, so a resumed file that changed on the server meanwhile is found like any other wrong
one; since its beginning may be to blame, it is fetched once more from the start.
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
"""Called with bytes done and bytes in all, before each write; with zeros while another process is waited for, so that
whoever looks for signs of life finds some. What it raises ends the work."""
Verify = Callable[[Path], None]
"""Removes the file and raises StoreError unless it has the checksum that it should have."""

ATTEMPTS = 5  # in a row without a single byte of progress
BACKOFF_SECONDS = 1.0
PASSING = (429, 500, 502, 503, 504)  # statuses that a later attempt may not meet


class RefusedError(StoreError):
    """The server answers with a status that no later attempt will change."""

    def __init__(self, url: str, status: int) -> None:
        super().__init__(f"{shown(url)}: the server answers {status}")
        self.status = status


def download(
    client: httpx.Client, url: str, target: Path, *, verify: Verify, num_bytes: int, progress: Progress
) -> None:
    """Fetch `url` into `target`.

    Raises:
        RefusedError: the server refuses.
        StoreError: the network stays down, the disk is full, or the content is not the one that it should be.
    """
    partial = target.with_name(target.name + ".partial")
    resumed = _size(partial) > 0
    ensure_space(target.parent, num_bytes - _size(partial))
    _fetch(client, url, partial, num_bytes, progress)
    try:
        verify(partial)
    except StoreError:
        if not resumed:
            raise
        _fetch(client, url, partial, num_bytes, progress)
        verify(partial)
    commit(partial, target)


def _fetch(client: httpx.Client, url: str, partial: Path, num_bytes: int, progress: Progress) -> None:
    """All bytes of it, in as many attempts as make progress."""
    partial.touch()  # of an empty file there is nothing to fetch
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


def _attempt(client: httpx.Client, url: str, partial: Path, num_bytes: int, progress: Progress) -> str:
    """Add what the server sends; says what went wrong if that was not the rest of the file."""
    try:
        _append(client, url, partial, _size(partial), num_bytes, progress)
    except httpx.HTTPStatusError as error:
        code = error.response.status_code
        if code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            partial.unlink()  # what is here is longer than the server's file, so it is not the beginning of it
        elif code not in PASSING:
            raise RefusedError(url, code) from None
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
                progress(min(file.tell() + len(chunk), num_bytes), num_bytes)
                file.write(chunk)
                file.flush()  # to the system, which outlives this process
                if file.tell() > num_bytes:
                    return  # longer than it may be; the checksum will say so


def verify_sha256(path: Path, sha256: str) -> None:
    """See `Verify`."""
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


LARGER_CACHE = "set NEMOSERVE_CACHE to a larger disk"


def ensure_space(folder: Path, num_bytes: int, advice: str = LARGER_CACHE) -> None:
    """Raise StoreError now rather than when the disk is full."""
    if (free := shutil.disk_usage(folder).free) < num_bytes:
        raise StoreError(f"{folder}: {num_bytes:,} more bytes are needed and {free:,} are free; make room or {advice}")


def disk_error(path: Path, missing: int, error: OSError, advice: str = LARGER_CACHE) -> StoreError:
    """An OSError of writing, in words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(f"{path.parent}: no space left, {missing:,} more bytes are needed; make room or {advice}")
    return StoreError(f"{path}: {error.strerror or error}")


def shown(url: str) -> str:
    """A URL as messages may have it: without the password of a private index."""
    return str(httpx.URL(url).copy_with(userinfo=b""))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
