"""What the programs of bench/ measure, as types and arithmetic; also the schema of bench/results/*.json. Torch-free.

    Job ──► peer, in a process of its own ──► PeerReport (one Run per number of streams) ──► Comparison ──► table, JSON

A result file is one `Comparison` as JSON; field names end in their unit, and `schema` grows when a field changes its
meaning.
"""

from __future__ import annotations

import math
import os
import platform
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import msgspec

SCHEMA = 2


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a peer is asked to do: for each number of streams, so many equally long prompts at the same time.

    Attributes:
        model: a `.gguf` file or a checkpoint directory.
        dtype, device: "auto" or a name that the peer knows.
        threads: intra-op CPU threads.
        seed: fixes the prompts; another one in each round, so that nothing cached from an earlier round helps.
    """

    model: str
    dtype: str
    device: str
    threads: int
    streams: list[int]
    prompt_tokens: int
    new_tokens: int
    seed: int

    def prompts(self, streams: int, vocab_size: int) -> list[list[int]]:
        """Random token ids: what a dense decoder computes does not depend on what they say."""
        rng = random.Random(f"{self.seed}/{streams}")
        return [[rng.randrange(vocab_size) for _ in range(self.prompt_tokens)] for _ in range(streams)]


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One number of streams, once.

    Attributes:
        tokens_per_second: generated tokens of all streams over the time from the first submission to the last token;
            the prompts' computation is in that time.
        ttft_*: from submission to a stream's first token. itl_*: between two tokens of a stream. Percentiles over all
            streams and gaps.
        first_tokens: the first token of each stream, to see that the peers compute the same model.
        steps, step_seconds, host_seconds: of an engine that tells them: how many there were, their time, and what of it
            was spent outside of the decoder.
    """

    streams: int
    tokens: int
    seconds: float
    tokens_per_second: float
    ttft_p50_seconds: float
    ttft_p95_seconds: float
    itl_p50_seconds: float
    itl_p95_seconds: float
    first_tokens: list[int]
    steps: int = 0
    step_seconds: float = 0.0
    host_seconds: float = 0.0


class PeerReport(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of one peer. `peak_rss_bytes` is of the process that runs the model, mapped file pages included."""

    peer: str
    version: str
    dtype: str
    device: str
    weight_bytes: int
    load_seconds: float
    peak_rss_bytes: int
    runs: list[Run]


class Bandwidth(msgspec.Struct, frozen=True, kw_only=True):
    """Of the memory of the device: what a copy moves (read plus written), and what reading alone reaches."""

    copy_bytes_per_second: float
    read_bytes_per_second: float


class Limits(Bandwidth, frozen=True, kw_only=True):
    """Also what the matrix units reach in bfloat16: 2 per multiplication and addition."""

    matrix_flops_per_second: float


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where it was measured. `load_average` is the one-minute average before the first peer: near 0, or others ran."""

    cpu: str
    cores: int
    python: str
    system: str
    load_average: float


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Of a model. `streamed_parameters` are those that a decode step reads: all but an embedding table that is not the
    head as well."""

    vocab_size: int
    parameters: int
    streamed_parameters: int


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """What a run moved and computed per second while it decoded, by its weights alone, and the shares of the limits.

    Keys and values are not counted: at these lengths they are a few per cent.
    """

    bytes_per_second: float
    flops_per_second: float
    share_of_read: float
    share_of_matrix: float

    @classmethod
    def of(cls, run: Run, weight_bytes: int, facts: Facts, limits: Limits) -> Rates:
        """Each step reads the streamed weights once and multiplies them with each stream's token."""
        moved = weight_bytes * facts.streamed_parameters / facts.parameters / run.itl_p50_seconds
        computed = 2 * facts.streamed_parameters * run.streams / run.itl_p50_seconds
        return cls(
            bytes_per_second=moved,
            flops_per_second=computed,
            share_of_read=moved / limits.read_bytes_per_second,
            share_of_matrix=computed / limits.matrix_flops_per_second,
        )


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """A result file. `reports` are in the order in which they were measured: A B A B."""

    schema: int = SCHEMA
    started_at: str  # ISO 8601, UTC
    machine: Machine
    limits: Limits
    facts: Facts
    job: Job
    reports: list[PeerReport]

    def peers(self) -> list[str]:
        """Names in order of appearance."""
        return list(dict.fromkeys(report.peer for report in self.reports))

    def of(self, peer: str) -> list[PeerReport]:
        """All rounds of one peer."""
        return [report for report in self.reports if report.peer == peer]

    def runs(self, peer: str, streams: int) -> list[Run]:
        """All rounds of one peer at one number of streams."""
        return [run for report in self.of(peer) for run in report.runs if run.streams == streams]

    def best(self, peer: str, streams: int) -> Run:
        """The fastest round: what else runs on the machine only ever takes speed away."""
        return max(self.runs(peer, streams), key=lambda run: run.tokens_per_second)


def summarise(submitted: Sequence[float], arrivals: Sequence[Sequence[float]], first_tokens: Sequence[int]) -> Run:
    """A Run from times in seconds on one clock.

    Args:
        submitted: of each stream.
        arrivals: of each stream, one time per token, ascending, at least one.
    """
    tokens = sum(len(times) for times in arrivals)
    seconds = max(times[-1] for times in arrivals) - min(submitted)
    ttft = [times[0] - start for start, times in zip(submitted, arrivals, strict=True)]
    itl = [later - earlier for times in arrivals for earlier, later in pairwise(times)]
    return Run(
        streams=len(arrivals),
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        ttft_p50_seconds=percentile(ttft, 50),
        ttft_p95_seconds=percentile(ttft, 95),
        itl_p50_seconds=percentile(itl, 50),
        itl_p95_seconds=percentile(itl, 95),
        first_tokens=list(first_tokens),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks (numpy's default); 0 of no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    rank = percent / 100 * (len(ordered) - 1)
    low, high = math.floor(rank), math.ceil(rank)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def agreement(ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Share of streams whose first tokens are equal."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def this_machine() -> Machine:
    """The machine that runs this program."""
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in info if line.startswith("model name")]
    return Machine(
        cpu=names[0] if names else platform.processor(),
        cores=len(os.sched_getaffinity(0)),
        python=platform.python_version(),
        system=platform.platform(),
        load_average=os.getloadavg()[0],
    )


def peak_rss_bytes(pid: int | None = None) -> int:
    """Largest resident set that a living process (None = this one) has had."""
    return _status_bytes(pid, "VmHWM")


def anonymous_bytes(pid: int | None = None) -> int:
    """Memory of a living process that is no page of a file."""
    return _status_bytes(pid, "RssAnon")


def children(pid: int) -> list[int]:
    """Processes that a living process has started. Source: proc_pid_task_children(5)."""
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def _status_bytes(pid: int | None, field: str) -> int:
    """Source: proc_pid_status(5)."""
    for line in Path(f"/proc/{pid or 'self'}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"the kernel does not tell {field} of process {pid or 'self'}")


def write_result(path: Path, result: msgspec.Struct) -> None:
    """A result file, its folder with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
