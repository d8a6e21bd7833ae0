"""`python -m bench.engine`: this engine beside `transformers.generate`; same weights, prompts and machine, one run.

Each peer is a process of its own, so that threads, allocator and peak memory are its own, and they take turns (A B A B)
so that a machine that grows slower or faster does so for both. Of each peer the best round counts, since other load
only ever takes speed away; `--json` keeps all rounds (`bench.measure.Comparison`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import click
import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from bench.measure import Comparison, Job, Limits, PeerReport, Rates, agreement, this_machine, write_result
from bench.options import facts_of, model_path, numbers

T = TypeVar("T")
QUIET = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}  # progress bars and advice of transformers


@click.command(context_settings={"show_default": True})
@click.option("--model", default="smollm2-135m-instruct", help="a .gguf file, a folder, or a name of the catalogue")
@click.option("--streams", callback=numbers, default="1,4,16,32", help="numbers of concurrent requests")
@click.option("--new-tokens", type=click.IntRange(2), default=128, help="tokens to generate per request")
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, help="tokens of each prompt")
@click.option("--rounds", type=click.IntRange(1), default=2, help="how often each peer has its turn")
@click.option("--dtype", default="auto", help="of this engine: auto, bfloat16 or float32")
@click.option("--transformers-dtype", default="bfloat16", help="of transformers: bfloat16 or float32")
@click.option("--device", default="auto", help="auto, cpu or cuda")
@click.option("--threads", type=click.IntRange(1), default=len(os.sched_getaffinity(0)), help="of each peer")
@click.option("--timeout", default=3600.0, help="seconds that one turn of one peer may take")
@click.option("--transformers/--no-transformers", default=True, help="measure transformers as well")
@click.option("--json", type=click.Path(path_type=Path), help="also write the result to this file")
def main(
    model: str,
    streams: list[int],
    new_tokens: int,
    prompt_tokens: int,
    rounds: int,
    dtype: str,
    transformers_dtype: str,
    device: str,
    threads: int,
    timeout: float,
    transformers: bool,
    json: Path | None,
) -> None:
    """Measure tokens/s, TTFT, ITL, peak memory and weight streaming of the engine, beside transformers."""
    job = Job(
        model=str(model_path(model)),
        dtype=dtype,
        device=device,
        threads=threads,
        streams=streams,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        seed=0,
    )
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    machine, facts = this_machine(), facts_of(Path(job.model))
    limits = _measure("bench.limits", job, timeout, Limits)
    reports = []
    for seed in range(rounds):
        print(f"round {seed + 1} of {rounds}", file=sys.stderr)
        turn = msgspec.structs.replace(job, seed=seed)
        reports.append(_measure("bench.peers.nemoserve", turn, timeout, PeerReport))
        if transformers:
            theirs = msgspec.structs.replace(turn, dtype=transformers_dtype)
            reports.append(_measure("bench.peers.transformers", theirs, timeout, PeerReport))
    shown = msgspec.structs.replace(job, model=Path(job.model).name)  # where it lies is nobody's business
    result = Comparison(started_at=started_at, machine=machine, limits=limits, facts=facts, job=shown, reports=reports)
    if json is not None:
        write_result(json, result)
    show(result, Console())


def _measure(module: str, job: Job, timeout: float, result: type[T]) -> T:
    """Run a program to its end in a process of its own; what it says on standard error goes to ours."""
    command, name = [sys.executable, "-m", module], module.rpartition(".")[2]
    try:
        done = subprocess.run(
            command,
            input=msgspec.json.encode(job),
            stdout=subprocess.PIPE,
            timeout=timeout,
            check=True,
            env=os.environ | QUIET,
        )
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{name} ended with status {error.returncode}; see above") from None
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{name} took longer than --timeout {timeout:g} seconds") from None
    return msgspec.json.decode(done.stdout, type=result)


def show(result: Comparison, console: Console) -> None:
    """The comparison as a table: best round of each peer, spread over the rounds, and ratios to the last peer."""
    job, peers = result.job, result.peers()
    table = Table(
        title=f"{Path(job.model).name}: {job.prompt_tokens} prompt + {job.new_tokens} new tokens, greedy, "
        f"{job.threads} threads",
        caption="best round; TTFT and ITL are p50/p95; GB/s and GFLOP/s: weights / ITL p50, and of the limit",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("streams", justify="right")
    table.add_column("engine")
    for column in ("tokens/s (worst)", "ratio", "TTFT ms", "ITL ms", "GB/s", "GFLOP/s"):
        table.add_column(column, justify="right")
    for streams in job.streams:
        baseline = result.best(peers[-1], streams).tokens_per_second
        for peer in peers:
            best = result.best(peer, streams)
            rates = Rates.of(best, result.of(peer)[0].weight_bytes, result.facts, result.limits)
            worst = min(run.tokens_per_second for run in result.runs(peer, streams))
            table.add_row(
                str(streams),
                peer,
                f"{best.tokens_per_second:.1f} ({worst:.1f})",
                f"{best.tokens_per_second / baseline:.2f}x" if len(peers) > 1 else "",
                f"{1000 * best.ttft_p50_seconds:.0f}/{1000 * best.ttft_p95_seconds:.0f}",
                f"{1000 * best.itl_p50_seconds:.1f}/{1000 * best.itl_p95_seconds:.1f}",
                f"{rates.bytes_per_second / 1e9:.1f} ({rates.share_of_read:.0%})",
                f"{rates.flops_per_second / 1e9:.0f} ({rates.share_of_matrix:.0%})",
                end_section=peer == peers[-1],
            )
    console.print(table)
    _show_details(result, console)


def _show_details(result: Comparison, console: Console) -> None:
    job, peers = result.job, result.peers()
    for peer in peers:
        report = result.of(peer)[0]
        peak = max(each.peak_rss_bytes for each in result.of(peer))
        console.print(
            f"{peer} ({report.version}): {report.dtype} on {report.device}, weights {report.weight_bytes / 2**20:.0f} "
            f"MiB, loaded in {report.load_seconds:.1f} s, peak memory {peak / 2**20:.0f} MiB"
        )
    for streams in job.streams:
        best = result.best(peers[0], streams)
        if best.steps:
            step = 1e6 * best.host_seconds / best.steps
            console.print(
                f"host overhead at {streams} streams: {step:.0f} us per step, {step / streams:.0f} us per sequence, "
                f"{100 * best.host_seconds / best.step_seconds:.1f} % of the time of {best.steps} steps"
            )
    console.print(
        f"this machine: copies {result.limits.copy_bytes_per_second / 1e9:.1f} GB/s (read plus written), "
        f"reads {result.limits.read_bytes_per_second / 1e9:.1f} GB/s, multiplies bfloat16 matrices at "
        f"{result.limits.matrix_flops_per_second / 1e9:.0f} GFLOP/s; "
        f"load average before: {result.machine.load_average:.2f}"
    )
    if len(peers) > 1:
        pairs = [
            (ours.first_tokens, theirs.first_tokens)
            for streams in job.streams
            for ours, theirs in zip(result.runs(peers[0], streams), result.runs(peers[-1], streams), strict=True)
        ]
        same = agreement([t for pair in pairs for t in pair[0]], [t for pair in pairs for t in pair[1]])
        console.print(f"same first token: {100 * same:.0f} % of {sum(len(pair[0]) for pair in pairs)} streams")


if __name__ == "__main__":
    main()
