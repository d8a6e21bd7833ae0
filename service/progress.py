"""How far a download or a load is: a bar on a terminal, elsewhere a line every few seconds, for log collectors."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from engine import Done, LoadProgress
from service.models.download import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

log = logging.getLogger(__name__)

LINE_SECONDS = 5.0
DOWNLOAD = "download"  # the phase in which files are fetched; every other one is the engine's


@contextmanager
def pull_progress(model: str, verb: str = "pull") -> Iterator[Progress]:
    """Show the bytes that the callback is told of until the context ends."""
    if not sys.stderr.isatty():
        yield lines(model, sys.stderr, verb=verb)
        return
    with _bar() as bar:
        task = bar.add_task(f"{verb} {model}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)


def lines(model: str, out: TextIO, every: float = LINE_SECONDS, verb: str = "pull") -> Progress:
    """A callback that writes the first state, the last one, and those between at most once in `every` seconds."""
    last: float | None = None

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if total and (last is None or done == total or now - last >= every):
            last = now
            out.write(f"{verb} {model}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB ({done / total:.0%})\n")
            out.flush()

    return report


@contextmanager
def load_progress(model: str, *, bar: bool) -> Iterator[LoadProgress]:
    """Show how far a load is until the context ends.

    Args:
        bar: on a terminal: bytes read, bytes per second and the time left; else log events.
    """
    if not bar:
        yield LoadLog()
        return
    with _bar() as shown:
        task = shown.add_task(f"load {model}", total=None)

        def report(phase: str, done: Done) -> None:
            # Without the model's name, beside which the numbers have no room in 80 columns.
            shown.update(task, description=phase, completed=done.read, total=done.total or None)

        yield report


class LoadLog:
    """Log events of one load: at most one in `every` seconds while files are fetched or weights are read, and one when
    they all are."""

    def __init__(self, every: float = LINE_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._every, self._clock = every, clock
        self._began = self._last = clock()
        self._complete: set[bool] = set()

    def __call__(self, phase: str, done: Done) -> None:
        now, fetches = self._clock(), phase == DOWNLOAD
        if done.read == 0:  # libraries are loaded first, which says nothing of the disk
            self._began = self._last = now
        complete = 0 < done.total == done.read
        if fetches not in self._complete and done.total and (complete or now - self._last >= self._every):
            self._last = now
            if complete:
                self._complete.add(fetches)
            events = ("downloading", "downloaded") if fetches else ("loading", "weights read")
            self._write(events[complete], done, max(now - self._began, 1e-3))

    def _write(self, event: str, done: Done, seconds: float) -> None:
        rate = done.read / seconds
        fields = {
            "gb": f"{done.read / 1e9:.2f}",
            "of_gb": f"{done.total / 1e9:.2f}",
            "mb_per_s": round(rate / 1e6),
            "seconds": round(seconds, 1),
        }
        if rate and done.read < done.total:
            fields["seconds_left"] = round((done.total - done.read) / rate)
        log.info(event, extra=fields)


def _bar() -> Bar:
    """Bytes done and in all, bytes per second, time left. rich is loaded by who has a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Bar(*columns, console=Console(stderr=True))
