"""What a load on a server showed: as text for a terminal, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from service.bench.load import Measured
from service.cli.tables import table

WIDTH, HEIGHT, MARGIN = 360.0, 220.0, 50.0
COLOUR = "#1f5fa8"


def text(result: Measured) -> str:
    """A few lines and a table; of requests that all failed, why."""
    plan = result.plan
    how = f"{plan.concurrency} at once" if plan.rate is None else f"{plan.rate:g} per second"
    head = f"{result.server}: {result.completed} of {plan.requests} requests in {result.seconds:.1f} s, {how}"
    failed = [f"failed {count} times: {error}" for error, count in result.failed.items()]
    if not result.completed:
        return "\n".join([head, *failed])
    prompt, new = result.prompt_tokens / result.completed, result.new_tokens / result.completed
    spreads = {
        "time to first token": result.ttft_seconds,
        "between two messages": result.itl_seconds,
        "per token after the first": result.tpot_seconds,
        "whole request": result.latency_seconds,
    }
    rows = [["", "mean", "p50", "p90", "p99"]]
    for name, spread in spreads.items():
        values = (spread.mean, spread.p50, spread.p90, spread.p99)
        rows.append([name, *(f"{1000 * value:.1f} ms" for value in values)])
    lines = [
        f"{head}; {prompt:.0f} tokens in, {new:.0f} out",
        f"{result.new_tokens_per_second:.1f} new tokens/s, {result.total_tokens_per_second:.1f} tokens/s, "
        f"{result.requests_per_second:.2f} requests/s",
        "",
        table(rows),
        *failed,
    ]
    return "\n".join(lines)


def plot(result: Measured) -> str:
    """SVG: which share of first tokens, and of gaps, took no longer than how long."""
    charts = [("time to first token", result.ttfts), ("between two messages", result.itls)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * (WIDTH + MARGIN) + MARGIN:.0f} '
        f'{HEIGHT + 2 * MARGIN:.0f}" font-family="sans-serif" font-size="12">'
        '<rect width="100%" height="100%" fill="white"/>',
        _words(
            MARGIN,
            20,
            f"{result.server}: {result.new_tokens_per_second:.1f} new tokens/s, "
            f"{result.completed} requests of {result.plan.requests}",
        ),
    ]
    for number, (title, values) in enumerate(charts):
        parts += _shares(MARGIN + number * (WIDTH + MARGIN), MARGIN, title, values)
    return "\n".join([*parts, "</svg>\n"])


def _shares(left: float, top: float, title: str, values: Sequence[float]) -> list[str]:
    """A curve from 0 to 100 % over sorted values."""
    most = values[-1] if values and values[-1] > 0 else 1.0
    points = [(0.0, 0.0)]
    step = max(1, len(values) // 500)  # more points than that nobody sees
    points += [(value, (at + 1) / len(values)) for at, value in enumerate(values) if at % step == 0 or value == most]
    line = " ".join(f"{left + WIDTH * x / most:.1f},{top + HEIGHT * (1 - y):.1f}" for x, y in points)
    grid = [
        f'<line x1="{left}" y1="{top + HEIGHT * (1 - share):.1f}" x2="{left + WIDTH}" '
        f'y2="{top + HEIGHT * (1 - share):.1f}" stroke="#dddddd"/>'
        + _words(left - 4, top + HEIGHT * (1 - share) + 4, f"{share:.0%}", "end")
        for share in (0.0, 0.5, 0.9, 1.0)
    ]
    ticks = [
        _words(left + WIDTH * share, top + HEIGHT + 18, f"{1000 * most * share:.3g} ms", "middle")
        for share in (0.25, 0.5, 0.75, 1.0)
    ]
    curve = f'<polyline points="{line}" fill="none" stroke="{COLOUR}" stroke-width="2"/>'
    return [*grid, *ticks, curve, _words(left, top - 8, title)]


def _words(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
