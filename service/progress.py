"""How far a download is, on stderr: a bar on a terminal, elsewhere a line every few seconds, for log collectors."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from service.models.download import Progress

LINE_SECONDS = 5.0


@contextmanager
def pull_progress(model: str) -> Iterator[Progress]:
    """Show the bytes that the callback is told of until the context ends."""
    if not sys.stderr.isatty():
        yield lines(model, sys.stderr)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"pull {model}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def lines(model: str, out: TextIO, every: float = LINE_SECONDS) -> Progress:
    """A callback that writes the first state, the last one, and those between at most once in `every` seconds."""
    last: float | None = None

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if last is None or done == total or now - last >= every:
            last = now
            out.write(f"pull {model}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB ({done / total:.0%})\n")
            out.flush()

    return report
