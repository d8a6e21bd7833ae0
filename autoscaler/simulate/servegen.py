"""Requests drawn from what ServeGen (arXiv 2505.09999) recorded of its clients: the renewal process of each client in
windows of 10 minutes, and the distribution of its lengths in windows of 6 hours.

A wanted rate is had by stretching the gaps of every client alike: its share of the load and the variation of its gaps
stay, as in ServeGen's own generator.
"""

from __future__ import annotations

import csv
import gzip
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

WINDOW_SECONDS = 600
DAY_SECONDS = 86400
SHARES = np.array([0.0, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0])


def draw(clients: Path, lengths: Path, options: dict[str, str], random: np.random.Generator) -> tuple[Any, Any, Any]:
    """Arrivals (0 is midnight of the first day), input tokens, output tokens. Takes the options that it knows out.

    Args:
        options: days (`3` or `1-2`, from 1), rate (mean, requests/s), hours (`9-12`: of each day only those).
    """
    first, last = span(options.pop("days", "1"), "days")
    opens, closes = span(options.pop("hours", "0-24"), "hours")
    wanted = float(options.pop("rate", 40.0))
    if not 0 < wanted < np.inf:
        raise ValueError(f"rate is {wanted:g}; it must be above 0")
    start, end = (first - 1) * DAY_SECONDS, last * DAY_SECONDS
    windows = [
        row
        for row in read(clients)
        if start <= float(row["window_start_s"]) < end
        and opens * 3600 <= float(row["window_start_s"]) % DAY_SECONDS < closes * 3600
    ]
    total = sum(float(row["rate_rps"]) for row in windows)
    if not total:
        raise ValueError(f"days {first}-{last}, hours {opens}-{closes}: nothing was recorded")
    count = (last - first + 1) * (closes - opens) * 3600 / WINDOW_SECONDS
    factor = wanted / (total / count)
    quantiles = Lengths(lengths)
    parts: list[tuple[Any, Any, Any]] = []
    for row in windows:
        opened = float(row["window_start_s"])
        times = renewals(row["pattern_G_or_W"], float(row["shape"]), float(row["scale"]) / factor, random)
        inputs, outputs = quantiles.draw(int(row["client"]), opened, len(times), random)
        # Hours that were left out take no time: days follow one another
        day, within = divmod(opened - start, DAY_SECONDS)
        parts.append((times + day * (closes - opens) * 3600 + within - opens * 3600, inputs, outputs))
    arrival, inputs, outputs = (np.concatenate(column) for column in zip(*parts, strict=True))
    return arrival, inputs, outputs


def span(value: str, name: str) -> tuple[int, int]:
    first, _, last = value.partition("-")
    low, high = int(first), int(last or first)
    if not 0 <= low <= high or (name == "hours" and not low < high <= 24) or (name == "days" and low < 1):
        raise ValueError(f"{name} is {value}: not a range of {name}")
    return low, high


def read(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt") as file:
        return list(csv.DictReader(file))


def renewals(pattern: str, shape: float, scale: float, random: np.random.Generator) -> Any:
    """Arrivals of one window of a renewal process that began a window earlier: nothing starts in step with it."""
    total, gaps = 0.0, []
    while total < 2 * WINDOW_SECONDS:
        some = random.gamma(shape, scale, 256) if pattern == "G" else scale * random.weibull(shape, 256)
        gaps.append(some)
        total += float(some.sum())
    at = np.cumsum(np.concatenate(gaps)) - WINDOW_SECONDS
    return at[(at >= 0) & (at < WINDOW_SECONDS)]


class Lengths:
    """Of prompts and answers, by client. One of which none were recorded has those of the next that has some."""

    def __init__(self, path: Path) -> None:
        self._windows: defaultdict[int, list[tuple[float, Any, Any]]] = defaultdict(list)
        for row in read(path):
            marks = (quantile_marks(row[f"{side}_q05_25_50_75_90_95_99_100"]) for side in ("input", "output"))
            self._windows[int(row["client"])].append((float(row["window_start_s"]), *marks))
        self._clients = np.array(sorted(self._windows))

    def draw(self, client: int, at: float, count: int, random: np.random.Generator) -> tuple[Any, Any]:
        if client not in self._windows:
            client = int(self._clients[np.searchsorted(self._clients, client) % len(self._clients)])
        windows = self._windows[client]
        _, inputs, outputs = min(windows, key=lambda window: abs(window[0] - at))
        drawn = (np.exp(np.interp(random.random(count), SHARES, marks)) for marks in (inputs, outputs))
        first, second = (np.maximum(each.round(), 1) for each in drawn)
        return first, second


def quantile_marks(text: str) -> Any:
    """Logarithms at SHARES: lengths are closer to log-normal than to pieces of even density."""
    marks = [max(float(mark), 1.0) for mark in text.split()]
    return np.log([marks[0], *marks])
