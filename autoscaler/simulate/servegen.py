"""Requests drawn from what ServeGen (arXiv 2505.09999) recorded of its clients: the renewal process of each client in
windows of 10 minutes, and the distribution of its lengths in windows of 6 hours.

A wanted rate is had by stretching the gaps of every client alike: its share of the load and the variation of its gaps
stay, as in ServeGen's own generator. The scale of its fits is not used: with gaps that vary much it contradicts the
rate that was counted.
"""

from __future__ import annotations

import csv
import gzip
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from autoscaler.simulate.synthetic import number

WINDOW_SECONDS = 600
LENGTHS_SECONDS = 6 * 3600
DAY_SECONDS = 86400
SHARES = np.array([0.0, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0])


def draw(clients: Path, lengths: Path, options: dict[str, str], random: np.random.Generator) -> tuple[Any, Any, Any]:
    """Arrivals (0 is midnight of the first day), input tokens, output tokens. Takes the options that it knows out.

    Args:
        options: days (`3` or `1-2`, from 1), rate (mean, requests/s), hours (`9-12`: of each day only those).
    """
    first, last = span(options.pop("days", "1"), "days")
    opens, closes = span(options.pop("hours", "0-24"), "hours")
    wanted = number(options, "rate", 40, 1e-6)
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
    rates: defaultdict[int, float] = defaultdict(float)
    for row in windows:
        rates[int(row["client"])] += float(row["rate_rps"])
    recorded = Lengths(lengths, rates)
    parts: list[tuple[Any, Any, Any]] = []
    for row in windows:
        opened = float(row["window_start_s"])
        mean = 1 / (factor * float(row["rate_rps"]))
        times = renewals(row["pattern_G_or_W"], float(row["shape"]), mean, random)
        inputs, outputs = recorded.draw(int(row["client"]), opened, len(times), random)
        # Hours that were left out take no time: days follow one another
        day, within = divmod(opened - start, DAY_SECONDS)
        parts.append((times + day * (closes - opens) * 3600 + within - opens * 3600, inputs, outputs))
    arrival, inputs, outputs = (np.concatenate(column) for column in zip(*parts, strict=True))
    return arrival, inputs, outputs


def span(value: str, name: str) -> tuple[int, int]:
    first, _, last = value.partition("-")
    low, high = (int(each) if each.isdigit() else -1 for each in (first, last or first))
    if not 0 <= low <= high or (name == "hours" and not low < high <= 24) or (name == "days" and low < 1):
        raise ValueError(f"{name} is {value}: not a range of {name}")
    return low, high


def read(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt") as file:
        return list(csv.DictReader(file))


def renewals(pattern: str, shape: float, mean: float, random: np.random.Generator) -> Any:
    """Arrivals of one window of a renewal process that has gone on for ever.

    The gap that the window begins in is one of the density x f(x) / mean, since long gaps cover more of the time; what
    is left of it is uniform. Without this, processes whose gaps vary much would start with a burst in each window.
    """
    scale = mean / (shape if pattern == "G" else math.gamma(1 + 1 / shape))
    # Of a Gamma and of a Weibull, so weighted
    weighted = random.gamma(shape + 1) if pattern == "G" else random.gamma(1 + 1 / shape) ** (1 / shape)
    total = random.random() * scale * weighted
    arrivals = [np.array([total])]
    while total < WINDOW_SECONDS:
        gaps = random.gamma(shape, scale, 256) if pattern == "G" else scale * random.weibull(shape, 256)
        arrivals.append(total + np.cumsum(gaps))
        total = float(arrivals[-1][-1])
    at = np.concatenate(arrivals)
    return at[at < WINDOW_SECONDS]


class Lengths:
    """Of prompts and answers, by client. One of which none were recorded draws from all others, by their rates."""

    def __init__(self, path: Path, rates: Mapping[int, float]) -> None:
        self._windows: defaultdict[int, list[tuple[float, Any, Any]]] = defaultdict(list)
        for row in read(path):
            marks = (quantile_marks(row[f"{side}_q05_25_50_75_90_95_99_100"]) for side in ("input", "output"))
            self._windows[int(row["client"])].append((float(row["window_start_s"]), *marks))
        self._clients = list(self._windows)
        weights = np.array([rates.get(client, 0.0) for client in self._clients])
        self._weights = weights / weights.sum() if weights.sum() else np.full(len(weights), 1 / len(weights))

    def draw(self, client: int, at: float, count: int, random: np.random.Generator) -> tuple[Any, Any]:
        if client in self._windows:
            return self._of(client, at, count, random)
        shares = random.multinomial(count, self._weights)
        parts = [self._of(each, at, share, random) for each, share in zip(self._clients, shares, strict=True) if share]
        if not parts:
            return np.zeros(0), np.zeros(0)
        order = random.permutation(count)
        inputs, outputs = (np.concatenate(column)[order] for column in zip(*parts, strict=True))
        return inputs, outputs

    def _of(self, client: int, at: float, count: int, random: np.random.Generator) -> tuple[Any, Any]:
        _, inputs, outputs = min(self._windows[client], key=lambda window: abs(window[0] + LENGTHS_SECONDS / 2 - at))
        drawn = (np.exp(np.interp(random.random(count), SHARES, marks)) for marks in (inputs, outputs))
        first, second = (np.maximum(each.round(), 1) for each in drawn)
        return first, second


def quantile_marks(text: str) -> Any:
    """Logarithms at SHARES: lengths are closer to log-normal than to pieces of even density."""
    marks = [max(float(mark), 1.0) for mark in text.split()]
    return np.log([marks[0], *marks])
