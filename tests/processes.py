"""Processes that tests look at from outside."""

from __future__ import annotations

from pathlib import Path


def children(process: int) -> list[int]:
    """Pids of the children of a process, from /proc."""
    tasks = Path(f"/proc/{process}/task")
    return [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]
