"""One process at a time, on a volume that several machines share: a lock of plain files, which need no flock.

    NAME.lock.7   the highest number is the lock. Its holder writes a new beat into it every BEAT_SECONDS, and "free"
                  when it is done. Who finds it free, or without a new beat for STALE_SECONDS, makes
    NAME.lock.8   with O_EXCL, which exactly one can, and removes the lower ones.

Numbers only grow, so that who was slow to take a lock cannot take what was taken and given back meanwhile. Clocks of
two machines are never compared: a beat is a change of content, and who waits measures how long there was none. A holder
that was stopped for so long finds the higher number before it writes another byte (`check`).
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from service.models.download import disk_error
from service.models.errors import StoreError

log = logging.getLogger(__name__)

BEAT_SECONDS = 2.0
STALE_SECONDS = 20.0  # ten beats: a network volume may hang a while; who died is replaced within half a minute
POLL_SECONDS = 0.25
_LENGTH = 128  # of the content, always: a beat takes no new block of a disk that is full
_FREE = b"free"


class SharedLock:
    """The lock of `path`, which is no file itself: its files are `path` with a number.

    Args:
        beat, stale: seconds, as above.
    """

    def __init__(self, path: Path, *, beat: float = BEAT_SECONDS, stale: float = STALE_SECONDS) -> None:
        self._path = path
        self._beat_seconds, self._stale_seconds = beat, stale
        self._number = 0
        self._beats = 0
        self._checked = 0.0
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None

    @contextmanager
    def held(self, waits: Callable[[], None] = lambda: None) -> Iterator[SharedLock]:
        """Wait for the lock, for as long as its holder lives, and hold it.

        Args:
            waits: called every POLL_SECONDS of the wait; what it raises ends that.

        Raises:
            StoreError: the folder cannot be written.
        """
        self._acquire(waits)
        try:
            yield self
        finally:
            self._release()

    def check(self) -> None:
        """Whether it is still held; to be asked before each write that the lock protects.

        Raises:
            StoreError: this process was stopped for so long that another one took the lock.
        """
        now = time.monotonic()
        if now - self._checked < self._beat_seconds:
            return
        self._checked = now
        if self._highest() > self._number:
            raise StoreError(f"{self._path.stem}: another process went on with it while this one was stopped")

    def _acquire(self, waits: Callable[[], None]) -> None:
        waiting = False
        seen, since = (0, b""), time.monotonic()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                now = (number := self._highest(), self._content(number))
                if now != seen:
                    seen, since = now, time.monotonic()
                stale = time.monotonic() - since > self._stale_seconds
                if number == 0 or now[1].startswith(_FREE) or stale:
                    if self._take(number + 1):
                        break
                    continue
                if not waiting:
                    waiting = True
                    holder = now[1].decode(errors="replace").strip()
                    log.warning("another process fetches this model; waiting for it", extra={"holder": holder})
                waits()
                time.sleep(POLL_SECONDS)
        except OSError as error:
            raise disk_error(self._path, _LENGTH, error) from None
        self._heart = threading.Thread(target=self._live, name="lock-heartbeat", daemon=True)
        self._heart.start()

    def _release(self) -> None:
        self._ended.set()
        if self._heart is not None:
            self._heart.join()
        with suppress(OSError):  # else it is found without a beat
            self._write(_FREE, os.O_WRONLY)

    def _take(self, number: int) -> bool:
        self._number, self._beats = number, 0
        try:
            self._write(self._words(), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return False
        if self._highest() > number:
            self._file(number).unlink(missing_ok=True)
            return False
        self._checked = time.monotonic()
        for lower in self._numbers():
            if lower < number:
                self._file(lower).unlink(missing_ok=True)
        return True

    def _live(self) -> None:
        while not self._ended.wait(self._beat_seconds):
            self._beat()

    def _beat(self) -> None:
        self._beats += 1
        with suppress(OSError):  # a volume that hangs for a while; who waits knows as much
            self._write(self._words(), os.O_WRONLY)

    def _words(self) -> bytes:
        return f"{socket.gethostname()[:64]} process {os.getpid()} beat {self._beats}".encode()

    def _write(self, words: bytes, flags: int) -> None:
        """In place; another machine sees it when it opens the file the next time."""
        file = os.open(self._file(self._number), flags, 0o644)
        try:
            os.pwrite(file, words.ljust(_LENGTH - 1) + b"\n", 0)
            os.fsync(file)
        finally:
            os.close(file)

    def _content(self, number: int) -> bytes:
        try:
            return self._file(number).read_bytes()
        except FileNotFoundError:  # removed since: there is a higher one
            return b""

    def _highest(self) -> int:
        return max(self._numbers(), default=0)

    def _numbers(self) -> list[int]:
        pattern = re.compile(re.escape(self._path.name) + r"\.(\d{1,18})")
        return [int(found[1]) for name in os.listdir(self._path.parent) if (found := pattern.fullmatch(name))]

    def _file(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")
