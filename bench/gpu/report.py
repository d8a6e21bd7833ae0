"""What bench.gpu found, as types (the schema of its JSON), and the lines that it prints. Torch-free.

A `Journal` writes the file after every entry, so that a fault of the device, which ends the process, costs nothing that
was measured before it.
"""

from __future__ import annotations

import traceback
from pathlib import Path

import msgspec

from bench.measure import Limits, write_result

SCHEMA = 1
_ROOT = Path(__file__).resolve().parents[2]
_OURS = tuple(f"{_ROOT / room}/" for room in ("engine", "bench"))


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """Where it was measured; "" where there is none."""

    name: str
    capability: str
    memory_bytes: int
    driver: str
    cuda: str
    torch: str
    triton: str
    python: str


class CardLimits(Limits, frozen=True, kw_only=True):
    """What this card reaches at best; in a trial its matrices are of float32.

    Attributes:
        fp8_flops_per_second: the same of e4m3 with a scale per row; None = no such units.
    """

    fp8_flops_per_second: float | None


class KernelResult(msgspec.Struct, frozen=True, kw_only=True):
    """One kernel on one shape.

    Attributes:
        error: largest |actual - expected| / (|expected| + rms of expected); None = it did not run: see `fault`.
        share: of the card's own limit for these bytes and operations that was reached.
    """

    name: str
    tolerance: float | None = None
    error: float | None = None
    seconds: float | None = None
    bytes_per_second: float | None = None
    flops_per_second: float | None = None
    share: float | None = None
    fault: str | None = None

    @property
    def passed(self) -> bool:
        if self.fault is not None or self.error is None or self.tolerance is None:
            return False
        return self.error <= self.tolerance


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One number of the whole engine.

    Attributes:
        part: which precision, or which other engine.
        mode: "eager" or "graphs".
        limit: the same figure if the card did nothing but its measured best.
        goal: of the project, on an H200.
    """

    part: str
    mode: str
    name: str
    value: float
    unit: str
    limit: float | None = None
    goal: float | None = None


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """Why something is not there, or what went wrong."""

    part: str
    text: str


class Report(msgspec.Struct, kw_only=True):
    """A result file."""

    schema: int = SCHEMA
    started_at: str  # ISO 8601, UTC
    card: Card
    trial: bool
    layers: int
    seconds: float = 0.0
    limits: CardLimits | None = None
    kernels: list[KernelResult] = []
    figures: list[Figure] = []
    skipped: list[Note] = []
    faults: list[Note] = []
    trying: str | None = None  # what a part's process has in hand, or had when it ended

    @property
    def failures(self) -> int:
        """Kernels that are wrong or did not run, and parts that broke."""
        return sum(not kernel.passed for kernel in self.kernels) + len(self.faults)


class Journal:
    """Adds entries to a report: each is printed and in the file at once."""

    def __init__(self, path: Path, report: Report) -> None:
        self._path = path
        self.report = report

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Goes on with what another process has begun."""
        return cls(path, msgspec.json.decode(path.read_bytes(), type=Report))

    def limits(self, limits: CardLimits) -> None:
        self.report.limits = limits
        copy, read = _rate(limits.copy_bytes_per_second, "B/s"), _rate(limits.read_bytes_per_second, "B/s")
        matrix, fp8 = _rate(limits.matrix_flops_per_second, "FLOP/s"), limits.fp8_flops_per_second
        units = "no units" if fp8 is None else _rate(fp8, "FLOP/s")
        self._tell(f"the card's own limits: copy {copy}, read {read}, matrices {matrix}, in FP8 {units}")

    def begin(self, name: str) -> None:
        """If this process ends before `end`, this has done it."""
        self.report.trying = name
        self.save()

    def end(self) -> None:
        self.report.trying = None
        self.save()

    def kernel(self, result: KernelResult) -> None:
        self.report.kernels.append(result)
        self._tell(kernel_line(result))

    def figure(self, figure: Figure) -> None:
        self.report.figures.append(figure)
        self._tell(figure_line(figure))

    def skip(self, part: str, text: str) -> None:
        self.report.skipped.append(Note(part=part, text=text))
        self._tell(f"{part}: skipped, {text}")

    def fault(self, part: str, error: BaseException | str) -> None:
        text = error if isinstance(error, str) else last_line(error)
        if isinstance(error, BaseException):
            traceback.print_exception(error)
        self.report.faults.append(Note(part=part, text=text))
        self._tell(f"{part}: FAULT {text}")

    def _tell(self, line: str) -> None:
        print(line, flush=True)
        self.save()

    def save(self) -> None:
        """Whole or not at all: the process may be ended at any time."""
        beside = self._path.with_suffix(".part")
        write_result(beside, self.report)
        beside.replace(self._path)


def last_line(error: BaseException) -> str:
    """What it is, the line of code it came from, and where that is not ours, the line of ours that led there."""
    said = traceback.format_exception_only(error)[-1].strip()
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(_OURS)]
    places = dict.fromkeys(f"{Path(frame.filename).name}:{frame.lineno}" for frame in (*frames[-1:], *ours[-1:]))
    return f"{said} ({' < '.join(places)})" if places else said


def kernel_line(result: KernelResult) -> str:
    start = f"{'ok   ' if result.passed else 'WRONG'} {result.name:46}"
    if result.fault is not None:
        start += f" {result.fault}"
    if result.error is not None and result.tolerance is not None:
        start += f" error {result.error:.1e} of {result.tolerance:.1e}"
    if result.seconds is None or result.share is None:
        return start
    rate = (
        _rate(result.bytes_per_second, "B/s") if result.bytes_per_second else "",
        _rate(result.flops_per_second, "FLOP/s") if result.flops_per_second else "",
    )
    return (
        f"{start}  {1e6 * result.seconds:9.1f} us  {' '.join(filter(None, rate))}  {100 * result.share:.0f} % of limit"
    )


def figure_line(figure: Figure) -> str:
    line = f"{figure.part:12} {figure.mode:7} {figure.name:34} {figure.value:12,.2f} {figure.unit}"
    if figure.limit:
        share = figure.limit / figure.value if figure.unit in ("s", "ms") else figure.value / figure.limit
        line += f"  {100 * share:.0f} % of limit {figure.limit:,.2f}"
    if figure.goal is not None:
        line += f"  (goal on an H200: {figure.goal:,.0f})"
    return line


def _rate(value: float, unit: str) -> str:
    scale, prefix = (1e12, "T") if value >= 1e12 else (1e9, "G")
    return f"{value / scale:,.2f} {prefix}{unit}"
