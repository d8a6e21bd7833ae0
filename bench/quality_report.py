"""What `bench.quality` found: the schema of its result file, its tables and its picture. Torch-free.

A result file is one `Report` as JSON; names end in their unit, and `schema` grows when a field changes its meaning.
"""

from __future__ import annotations

import math

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from bench.measure import Machine
from bench.svg import line, picture, text

SCHEMA = 1
KINDS = ("qkv", "attention_output", "gate_up", "down")  # of a layer, named as the decoder does


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """Of one decoder against a reference, over all positions of all passages.

    Attributes:
        kl_mean, kl_p99: KL(reference || decoder) of the next token's distribution, in nats.
        top1: share of positions at which both hold the same token for the likeliest.
        perplexity: exp of the mean negative log-likelihood of the text's own next tokens.
        increase: of perplexity, in parts of the reference's: 0.03 = 3 %.
        increase_error: standard error of `increase`, from its spread over the positions.
        increase_by_kind: the same for each kind of text.
    """

    kl_mean: float
    kl_p99: float
    top1: float
    perplexity: float
    increase: float
    increase_error: float
    increase_by_kind: dict[str, float]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One way to keep weights and cache.

    Attributes:
        weights: a scheme of the engine, or "float32".
        kv: "bf16" (the compute dtype) or "fp8".
        shuffled: the matrices were taken off the grid of their file (`bench.shuffle`).
        against: what it is compared with.
        weight_bytes, token_bytes: of all weights, and of one token in the cache.
    """

    weights: str
    kv: str
    shuffled: bool
    against: str
    weight_bytes: int
    token_bytes: int
    quality: Quality


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """KL if nothing but this is quantised. layer None: of all layers; kind "all": the four of a layer together."""

    layer: int | None
    kind: str
    kl_mean: float


class Sensitivity(msgspec.Struct, frozen=True, kw_only=True):
    """Of one scheme, on shuffled weights, bf16 cache. All matrices are kept as the scheme keeps most projections, those
    too that it would keep wider."""

    weights: str
    tokens: int
    cells: list[Cell]

    def kl(self, layer: int | None, kind: str) -> float | None:
        return next((cell.kl_mean for cell in self.cells if (cell.layer, cell.kind) == (layer, kind)), None)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A result file. `tokens` are those of each row, in passages of `passage_tokens`."""

    schema: int = SCHEMA
    started_at: str  # ISO 8601, UTC
    machine: Machine
    model: str
    parameters: int
    compute_dtype: str
    device: str
    tokens: int
    passage_tokens: int
    seconds: float
    rows: list[Row]
    sensitivities: list[Sensitivity]


def show(report: Report, console: Console) -> None:
    """Both tables."""
    table = Table(
        title=f"{report.model}: {report.tokens} tokens of real text, computed in {report.compute_dtype}",
        caption="KL in nats; ± is the standard error of the increase; * weights shuffled off the grid of a 4-bit file: "
        "what int8 and int4 make of floats. Without *, codes of such a file stay as they are, at next to no cost.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for column in ("weights", "cache", "against"):
        table.add_column(column)
    for column in ("weights MB", "KiB/token", "KL mean", "KL p99", "top-1 %", "perplexity", "increase %"):
        table.add_column(column, justify="right")
    for row in report.rows:
        found = row.quality
        table.add_row(
            row.weights + " *" * row.shuffled,
            row.kv,
            row.against,
            f"{row.weight_bytes / 1e6:.1f}",
            f"{row.token_bytes / 1024:.1f}",
            f"{found.kl_mean:.5f}",
            f"{found.kl_p99:.4f}",
            f"{100 * found.top1:.2f}",
            f"{found.perplexity:.3f}",
            f"{100 * found.increase:+.2f} ±{100 * found.increase_error:.2f}",
        )
    console.print(table)
    for each in report.sensitivities:
        _show_sensitivity(each, console)


def _show_sensitivity(found: Sensitivity, console: Console) -> None:
    table = Table(
        title=f"{found.weights}: KL x 1e4 if only this is quantised, {found.tokens} tokens",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("layer")
    for kind in (*KINDS, "all", "head", "embedding"):
        table.add_column(kind, justify="right")
    for layer in dict.fromkeys(cell.layer for cell in found.cells):
        values = (found.kl(layer, kind) for kind in (*KINDS, "all", "head", "embedding"))
        name = "all" if layer is None else str(layer)
        table.add_row(name, *("" if value is None else f"{1e4 * value:.2f}" for value in values))
    console.print(table)


_WIDTH, _HEIGHT, _LEFT, _TOP = 720, 340, 70, 30


def plot(report: Report) -> str:
    """SVG: KL, on a scale of powers of ten, over the bytes of the weights; hollow marks have an FP8 cache."""
    rows = [row for row in report.rows if row.quality.kl_mean > 0]
    exponents = [math.log10(row.quality.kl_mean) for row in rows]
    low, high = math.floor(min(exponents)), math.ceil(max(exponents) + 1e-9)
    most = 1.15 * max(row.weight_bytes for row in rows)
    bottom, right = _HEIGHT - 50, _WIDTH - 20

    def x(nbytes: float) -> float:
        return _LEFT + (right - _LEFT) * nbytes / most

    def y(exponent: float) -> float:
        return bottom - (bottom - _TOP) * (exponent - low) / max(high - low, 1)

    parts = [
        text(_LEFT, 18, f"{report.model}: mean KL to the reference (nats) over bytes of weights (MB)"),
    ]
    for exponent in range(low, high + 1):
        parts.append(line(_LEFT, y(exponent), right, y(exponent)))
        parts.append(text(_LEFT - 8, y(exponent) + 4, f"1e{exponent}", "end"))
    for step in range(6):
        parts.append(text(x(most * step / 5), bottom + 18, f"{most * step / 5e6:.0f}", "middle"))
    for row, kl in zip(rows, exponents, strict=True):
        across, up, fill = x(row.weight_bytes), y(kl), "none" if row.kv == "fp8" else "#1f5fa8"
        parts.append(f'<circle cx="{across:.1f}" cy="{up:.1f}" r="5" fill="{fill}" stroke="#1f5fa8"/>')
        side, anchor = (-9, "end") if row.kv == "fp8" else (9, "start")  # the two caches of a scheme lie close together
        parts.append(text(across + side, up + 4, f"{row.weights}{' *' * row.shuffled} / {row.kv}", anchor))
    caption = "weights / cache; hollow: FP8 cache; * shuffled off the file's own 4-bit grid"
    return picture(_WIDTH, _HEIGHT, [*parts, text(_LEFT, _HEIGHT - 10, caption)])
