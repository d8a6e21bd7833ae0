"""The timeline of runs as SVG, by hand: one band per run, and in each, above one another, replicas, queue, violations.

replicas     demand as an area, desired dashed, ready as a line, and faint what is paid for
queue        requests that no engine computes yet
violations   share of the requests that arrived between two looks
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from autoscaler.simulate.result import Result

WIDTH, LEFT, RIGHT = 960.0, 64.0, 16.0
TITLE, GAP, FOOT = 40.0, 14.0, 34.0
HEIGHTS = {"replicas": 150.0, "queued": 60.0, "late": 46.0}
POINTS = 900  # across: of more, each shows the highest
INK = {"demand": "#cfd8e3", "billed": "#f2b8a0", "desired": "#7a7a7a", "ready": "#1f5fa8", "bad": "#c0392b"}


def picture(results: Sequence[Result]) -> str:
    """A whole file. Runs that share a scale can be compared by eye: all of them do."""
    band = TITLE + sum(HEIGHTS.values()) + GAP * (len(HEIGHTS) - 1) + FOOT
    height = band * len(results)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {height:.0f}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>'
    )
    tallest = max(float(np.max(column, initial=1)) for each in results for column in replica_columns(each))
    longest = max(float(np.max(each.timeline.queued, initial=1)) for each in results)
    parts = [part for row, each in enumerate(results) for part in run(each, row * band, tallest, longest)]
    return "\n".join([head, *parts, "</svg>\n"])


def replica_columns(result: Result) -> tuple[Any, ...]:
    timeline = result.timeline
    return timeline.demand, timeline.desired, timeline.ready, timeline.billed


def run(result: Result, top: float, tallest: float, longest: float) -> Iterable[str]:
    """One band."""
    timeline, y = result.timeline, top + TITLE
    end = float(timeline.at[-1]) if len(timeline.at) else 1.0
    yield text(LEFT, top + 18, f"{result.policy} on {result.trace}", bold=True)
    figures = f"{result.violations:.2%} violations, {result.gpu_hours:.2f} GPU-hours, replicas as {result.curve} says"
    yield text(WIDTH - RIGHT, top + 18, figures, anchor="end")
    yield from legend(top + 34)

    demand, desired, ready, billed = (thinned(column) for column in replica_columns(result))
    at = thinned(timeline.at)
    panel = Panel(y, HEIGHTS["replicas"], tallest, end)
    yield from panel.frame("replicas")
    yield panel.area(at, demand, INK["demand"])
    yield panel.line(at, billed, INK["billed"], "")
    yield panel.line(at, desired, INK["desired"], "4 3")
    yield panel.line(at, ready, INK["ready"], "")
    y += HEIGHTS["replicas"] + GAP

    panel = Panel(y, HEIGHTS["queued"], longest, end)
    yield from panel.frame("queued")
    yield panel.area(at, thinned(timeline.queued), INK["ready"])
    y += HEIGHTS["queued"] + GAP

    panel = Panel(y, HEIGHTS["late"], 1.0, end)
    yield from panel.frame("violations", percent=True)
    yield panel.area(at, thinned(timeline.violations), INK["bad"])
    yield from hours(y + HEIGHTS["late"] + 14, end)


def thinned(column: Any) -> Any:
    """The highest of each few where there are more than fit."""
    few = -(-len(column) // POINTS)
    if few <= 1:
        return column
    starts = np.arange(0, len(column), few)
    return np.maximum.reduceat(column, starts)


class Panel:
    """A rectangle with a scale: seconds across, 0 to `most` up."""

    def __init__(self, top: float, height: float, most: float, end: float) -> None:
        self._top, self._height, self._most, self._end = top, height, most, end

    def frame(self, name: str, percent: bool = False) -> Iterable[str]:
        bottom = self._top + self._height
        for share in (0.0, 0.5, 1.0):
            y, value = bottom - share * self._height, share * self._most
            yield f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#e6e6e6"/>'
            if share != 0.5 or self._height > 100:
                yield text(LEFT - 6, y + 4, f"{value:.0%}" if percent else f"{value:.0f}", anchor="end")
        middle = self._top + self._height / 2
        turned = f'transform="rotate(-90 14 {middle:.1f})"'
        yield f'<text x="14" y="{middle:.1f}" text-anchor="middle" fill="#666" {turned}>{escape(name)}</text>'

    def _points(self, at: Any, values: Any) -> list[str]:
        """As steps: each value holds until the next look."""
        across = LEFT + np.append(at, self._end) / self._end * (WIDTH - LEFT - RIGHT)
        up = self._top + self._height * (1 - np.minimum(values / self._most, 1.0))
        return [
            f"{x:.1f},{y:.1f}" for left, right, y in zip(across, across[1:], up, strict=False) for x in (left, right)
        ]

    def line(self, at: Any, values: Any, ink: str, dashes: str) -> str:
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        points = " ".join(self._points(at, values))
        return f'<polyline points="{points}" fill="none" stroke="{ink}" stroke-width="1.5"{dashed}/>'

    def area(self, at: Any, values: Any, ink: str) -> str:
        points, bottom = self._points(at, values), self._top + self._height
        if not points:
            return ""
        left, right = points[0].split(",")[0], points[-1].split(",")[0]
        return f'<polygon points="{left},{bottom:.1f} {" ".join(points)} {right},{bottom:.1f}" fill="{ink}"/>'


def legend(y: float) -> Iterable[str]:
    x = LEFT
    names = {"demand": "demand (replicas)", "desired": "desired", "ready": "ready", "billed": "paid for"}
    for key, words in names.items():
        yield f'<rect x="{x:.1f}" y="{y - 8:.1f}" width="14" height="6" fill="{INK[key]}"/>'
        yield text(x + 18, y, words)
        x += 36 + 7 * len(words)


def hours(y: float, end: float) -> Iterable[str]:
    """The axis of time: some eight marks, in minutes or in hours."""
    unit, name = (3600.0, "h") if end > 3 * 3600 else (60.0, "min")
    spacing = next(each for each in (1, 2, 5, 10, 15, 30, 60, 120, 240) if end / unit / each <= 12 or each == 240)
    for mark in range(0, int(end / unit) + 1, spacing):
        x = LEFT + mark * unit / end * (WIDTH - LEFT - RIGHT)
        yield text(x, y, f"{mark}" if mark else f"0 {name}", anchor="middle" if mark else "start")


def text(x: float, y: float, words: str, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'
