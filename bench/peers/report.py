"""What `bench.peers` found: the schema of its result file, its table and its picture.

A result file is one `Peers` as JSON; names end in their unit, and `schema` grows when a field changes its meaning.
"""

from __future__ import annotations

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from bench.measure import Facts, Limits, Machine, Rates, Run
from bench.peers.workload import Case
from bench.svg import picture, text

SCHEMA = 1
OURS = "nemoserve"


class CaseRun(msgspec.Struct, frozen=True, kw_only=True):
    case: Case
    run: Run


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of one server with one kind of weights.

    Attributes:
        bits: of most weights; servers are compared with those of the same.
        weight_bytes: of all weights in memory, by parameters and the mean width of the kind.
        ready_seconds: from its start until it answered.
        peak_rss_bytes: summed over its processes.
    """

    server: str
    weights: str
    bits: int
    weight_bytes: int
    ready_seconds: float
    peak_rss_bytes: int
    runs: list[CaseRun]


class Skipped(msgspec.Struct, frozen=True, kw_only=True):
    server: str
    reason: str


class Peers(msgspec.Struct, frozen=True, kw_only=True):
    """A result file. `turns` are in the order in which they were measured: A B A B."""

    schema: int = SCHEMA
    started_at: str  # ISO 8601, UTC
    machine: Machine
    limits: Limits
    model: str
    facts: Facts
    threads: int
    turns: list[Turn]
    skipped: list[Skipped]

    @property
    def cases(self) -> list[Case]:
        """In the order in which they were asked."""
        found = {(each.case.name, each.case.streams): each.case for turn in self.turns for each in turn.runs}
        return list(found.values())

    @property
    def kinds(self) -> list[tuple[str, str]]:
        """(server, weights) in order of appearance."""
        return list(dict.fromkeys((turn.server, turn.weights) for turn in self.turns))

    def of(self, kind: tuple[str, str]) -> list[Turn]:
        return [turn for turn in self.turns if (turn.server, turn.weights) == kind]

    def speeds(self, kind: tuple[str, str], case: Case) -> list[Run]:
        """All rounds, the fastest first: what else runs on the machine only ever takes speed away."""
        runs = [each.run for turn in self.of(kind) for each in turn.runs if each.case == case]
        return sorted(runs, key=lambda run: -run.tokens_per_second)

    def rival(self, kind: tuple[str, str], case: Case) -> tuple[tuple[str, str], Run] | None:
        """The fastest of the others whose weights have as many bits, and its best round."""
        bits = self.of(kind)[0].bits
        others = [other for other in self.kinds if other[0] != OURS and self.of(other)[0].bits == bits]
        runs = [(other, runs[0]) for other in others if (runs := self.speeds(other, case))]
        return max(runs, key=lambda each: each[1].tokens_per_second, default=None)


def show(result: Peers, console: Console) -> None:
    """A table for each case, and what each server took to start and to live."""
    for case in result.cases:
        shared = f", {case.shared_tokens} of them shared and seen before" if case.shared_tokens else ""
        table = Table(
            title=f"{case.name}: {case.streams} streams, {case.prompt_tokens} prompt{shared} + {case.new_tokens} new",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        table.add_column("server")
        for column in ("tokens/s (worst)", "TTFT p50 ms", "ITL p50 ms", "GB/s", "GFLOP/s"):
            table.add_column(column, justify="right")
        table.add_column("against the best peer of as many bits")
        for kind in result.kinds:
            table.add_row(*_row(result, kind, case))
        console.print(table)
    for kind in result.kinds:
        turns = result.of(kind)
        console.print(
            f"{' '.join(kind)}: ready after {min(turn.ready_seconds for turn in turns):.1f} s, "
            f"peak memory {max(turn.peak_rss_bytes for turn in turns) / 2**20:.0f} MiB"
        )
    limits = result.limits
    console.print(
        f"this machine: reads {limits.read_bytes_per_second / 1e9:.1f} GB/s, copies "
        f"{limits.copy_bytes_per_second / 1e9:.1f} GB/s, multiplies bfloat16 matrices at "
        f"{limits.matrix_flops_per_second / 1e9:.0f} GFLOP/s; load average before: {result.machine.load_average:.2f}"
    )
    for each in result.skipped:
        console.print(f"skipped {each.server}: {each.reason}")


def _row(result: Peers, kind: tuple[str, str], case: Case) -> list[str]:
    runs = result.speeds(kind, case)
    if not runs:
        return [" ".join(kind), "did not answer"]
    best, worst = runs[0], runs[-1]
    rates = Rates.of(best, result.of(kind)[0].weight_bytes, result.facts, result.limits)
    rival = result.rival(kind, case) if kind[0] == OURS else None
    return [
        " ".join(kind),
        f"{best.tokens_per_second:.1f} ({worst.tokens_per_second:.1f})",
        f"{1000 * best.ttft_p50_seconds:.0f}",
        f"{1000 * best.itl_p50_seconds:.1f}",
        f"{rates.bytes_per_second / 1e9:.1f} ({rates.share_of_read:.0%})",
        f"{rates.flops_per_second / 1e9:.0f} ({rates.share_of_matrix:.0%})",
        ""
        if rival is None
        else f"{best.tokens_per_second / rival[1].tokens_per_second:.2f}x {' '.join(rival[0])}, "
        f"TTFT {best.ttft_p50_seconds / rival[1].ttft_p50_seconds:.2f}x",
    ]


_ROW, _GAP, _LEFT, _WIDTH, _BAR = 16, 22, 200, 760, 420
_COLOURS = {16: "#1f5fa8", 8: "#2e8b57", 4: "#b8860b"}


def plot(result: Peers) -> str:
    """SVG: a bar of tokens/s for every server in every case, ours filled; colours are bits of the weights."""
    parts: list[str] = []
    y = 40.0
    for case in result.cases:
        parts.append(text(10, y, f"{case.name}, {case.streams} streams", bold=True))
        y += 8
        runs = [(kind, found[0]) for kind in result.kinds if (found := result.speeds(kind, case))]
        most = max(run.tokens_per_second for _, run in runs)
        for kind, run in runs:
            colour, length = _COLOURS[result.of(kind)[0].bits], _BAR * run.tokens_per_second / most
            fill = colour if kind[0] == OURS else "none"
            parts.append(
                f'<rect x="{_LEFT}" y="{y:.1f}" width="{length:.1f}" height="{_ROW - 4}" fill="{fill}" '
                f'stroke="{colour}"/>'
            )
            parts.append(text(_LEFT - 8, y + 10, " ".join(kind), "end"))
            parts.append(text(_LEFT + length + 6, y + 10, f"{run.tokens_per_second:.0f}"))
            y += _ROW
        y += _GAP
    title = f"{result.model}: tokens/s of all streams; filled: nemoserve; blue 16, green 8, brown 4 bits"
    return picture(_WIDTH, y, [text(10, 18, title), *parts])
