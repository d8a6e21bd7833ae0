"""Made-up arrivals: a rate that changes in a known way, Poisson within it, prompts and answers log-normal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Rate = Callable[[Any, dict[str, str], np.random.Generator], Any]


def number(options: dict[str, str], name: str, default: float, lowest: float = 0.0) -> float:
    """Take an option out."""
    text = options.pop(name, default)
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}: not a number") from None
    if not (lowest <= value < np.inf):
        raise ValueError(f"{name} is {value:g}; it must be at least {lowest:g}")
    return value


def poisson(at: Any, options: dict[str, str], random: np.random.Generator) -> Any:
    """Always the same rate."""
    return np.ones_like(at)


def steps(at: Any, options: dict[str, str], random: np.random.Generator) -> Any:
    """Up to `factor` times the rate and back, every `every` seconds."""
    factor, every = number(options, "factor", 3), number(options, "every", 900, 1)
    return np.where((at // every) % 2 == 0, 1.0, factor)


def spikes(at: Any, options: dict[str, str], random: np.random.Generator) -> Any:
    """At random times, on average every `every` seconds, `factor` times the rate for `length` seconds."""
    factor, every = number(options, "factor", 4), number(options, "every", 900, 1)
    length = number(options, "length", 120, 1)
    rate = np.ones_like(at)
    start = random.exponential(every)
    while start < at[-1]:
        rate[(at >= start) & (at < start + length)] = factor
        start += length + random.exponential(every)
    return rate


def ramps(at: Any, options: dict[str, str], random: np.random.Generator) -> Any:
    """From the rate to `factor` times it and back, evenly, in `every` seconds each way."""
    factor, every = number(options, "factor", 4), number(options, "every", 1200, 1)
    return 1 + (factor - 1) * (1 - abs((at / every) % 2 - 1))


def diurnal(at: Any, options: dict[str, str], random: np.random.Generator) -> Any:
    """A day's wave from the rate to `factor` times it, least at 4 h, with noise of minutes."""
    factor, day = number(options, "factor", 4), number(options, "day", 86400, 60)
    wave = (1 - np.cos(2 * np.pi * (at / day - 4 / 24))) / 2
    noise = np.repeat(random.normal(0, 0.08, len(at) // 60 + 1), 60)[: len(at)]
    return (1 + (factor - 1) * wave) * np.exp(noise)


KINDS: dict[str, Rate] = {each.__name__: each for each in (poisson, steps, spikes, ramps, diurnal)}
HOURS = {"diurnal": 24.0}  # of the others: 1


def make(kind: str, options: dict[str, str], random: np.random.Generator) -> tuple[Any, Any, Any]:
    """Arrivals, input tokens, output tokens. Takes the options that it knows out.

    Args:
        options: rate (lowest, requests/s), hours, input and output (mean tokens), spread (sigma of their logarithm),
            and those of the kind.
    """
    rate, hours = number(options, "rate", 20, 1e-6), number(options, "hours", HOURS.get(kind, 1.0), 1 / 3600)
    means = number(options, "input", 1000, 1), number(options, "output", 200, 1)
    sigma = number(options, "spread", 0.8)
    at = np.arange(round(hours * 3600), dtype=np.float64)
    counts = random.poisson(rate * KINDS[kind](at, options, random))
    arrival = np.sort(np.repeat(at, counts) + random.random(int(counts.sum())))
    lengths = (np.exp(random.normal(np.log(mean) - sigma**2 / 2, sigma, len(arrival))) for mean in means)
    inputs, outputs = (np.clip(each, 1, 32 * mean).round() for each, mean in zip(lengths, means, strict=True))
    return arrival, inputs, outputs
