"""`python -m bench.peers`: the same requests to nemoserve, llama.cpp, vLLM and transformers, in turns on one machine.

    weights ──► each server in turn (A B A B) ──► every case: warm up, then the clock ──► table, JSON, SVG

A server is a process tree of its own that is started, asked over its own protocol, weighed and stopped; the client is
this process for all of them. transformers has no server in this comparison: `generate` with one batch, its best case.
What is not installed is skipped, with the way to install it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import click
import grpc
import httpx
import msgspec
from rich.console import Console

from bench.limits import measure as measure_limits
from bench.measure import Facts, Job, PeerReport, Run, summarise, this_machine, write_result
from bench.options import facts_of, names, numbers
from bench.peers.processes import ServerFailedError, peak_bytes
from bench.peers.report import CaseRun, Peers, Skipped, Turn, plot, show
from bench.peers.servers import Capacity, LlamaCpp, Nemoserve, Server, Vllm
from bench.peers.weights import NEMO_1B, Weights, prepare
from bench.peers.workload import Case, cases

SERVERS = ("nemoserve", "llama.cpp", "vllm", "transformers")
TRANSFORMERS_SECONDS = 1800.0
CACHE = Path.home() / ".cache" / "nemoserve" / "bench"


@click.command(context_settings={"show_default": True})
@click.option("--model", default="smollm2-135m-instruct", help=f"a name of the catalogue, a .gguf file, or {NEMO_1B}")
@click.option("--servers", callback=names(SERVERS), default=",".join(SERVERS), help="who takes part")
@click.option("--precisions", default="auto,int8,bf16", help="of ours, each a turn; auto is the GGUF file as it is")
@click.option("--llama-types", default="FILE,Q8_0,BF16", help="of llama.cpp, likewise; FILE is the GGUF file as it is")
@click.option("--llama-cpp", type=click.Path(path_type=Path), help="folder of llama-server and llama-quantize")
@click.option("--vllm", type=click.Path(path_type=Path), help="folder of the environment that has vllm")
@click.option("--streams", callback=numbers, default="1,4,16,32", help="numbers of concurrent requests")
@click.option("--prompt-tokens", type=click.IntRange(2), default=128, help="tokens of each prompt")
@click.option("--new-tokens", type=click.IntRange(2), default=128, help="tokens to generate per request")
@click.option("--long-tokens", type=click.IntRange(2), default=2048, help="tokens of the one long prompt")
@click.option("--shared-tokens", type=click.IntRange(1), default=1024, help="of the prefix that streams share")
@click.option("--rounds", type=click.IntRange(1), default=2, help="how often each has its turn")
@click.option("--threads", type=click.IntRange(1), default=len(os.sched_getaffinity(0)), help="of each server")
@click.option("--folder", type=click.Path(path_type=Path), default=CACHE, help="where weights of all forms are kept")
@click.option("--json", type=click.Path(path_type=Path), help="write the result here, and the plot beside it as .svg")
def main(
    model: str,
    servers: list[str],
    precisions: str,
    llama_types: str,
    llama_cpp: Path | None,
    vllm: Path | None,
    streams: list[int],
    prompt_tokens: int,
    new_tokens: int,
    long_tokens: int,
    shared_tokens: int,
    rounds: int,
    threads: int,
    folder: Path,
    json: Path | None,
) -> None:
    """Compare servers on one workload; every figure comes from this run."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a server must not outlive us
    weights = prepare(model, folder / Path(model).stem)
    workload = cases(streams, prompt_tokens, new_tokens, long_tokens, shared_tokens)
    lengths = [(case.streams, case.prompt_tokens + case.new_tokens + 16) for case in workload]
    capacity = Capacity(
        streams=max(count for count, _ in lengths),
        context=max(length for _, length in lengths),
        tokens=max(count * length for count, length in lengths),
        threads=threads,
    )
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    machine, limits, facts = this_machine(), measure_limits(threads, "cpu"), facts_of(weights.hf)
    contenders: list[Server] = []
    if "nemoserve" in servers:
        contenders += _ours(weights, precisions.split(","), capacity)
    if "llama.cpp" in servers:
        contenders += _llamas(weights, llama_types.split(","), llama_cpp, capacity)
    if "vllm" in servers:
        contenders.append(Vllm(vllm, weights.hf, capacity))
    skipped = [Skipped(server=each.name, reason=reason) for each in contenders if (reason := each.missing())]
    contenders = [each for each in contenders if not each.missing()]
    turns: list[Turn] = []
    for number in range(rounds):
        for each in contenders:
            _say(f"round {number + 1} of {rounds}: {each.name} {each.weights}")
            try:
                turns.append(_turn(each, workload, facts, number))
            except ServerFailedError as error:
                _say(str(error))
                reason = f"round {number + 1}: {str(error).splitlines()[0]}"
                skipped.append(Skipped(server=f"{each.name} {each.weights}", reason=reason))
        if "transformers" in servers:
            _say(f"round {number + 1} of {rounds}: transformers bf16")
            turns.append(_transformers(weights.hf, workload, threads, number))
    result = Peers(
        started_at=started_at,
        machine=machine,
        limits=limits,
        model=Path(model).name,
        facts=facts,
        threads=threads,
        turns=turns,
        skipped=list({each.server: each for each in skipped}.values()),
    )
    if json is not None:
        write_result(json, result)
        json.with_suffix(".svg").write_text(plot(result))
    show(result, Console())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _ours(weights: Weights, precisions: list[str], capacity: Capacity) -> Iterator[Server]:
    for precision in precisions:
        yield Nemoserve(weights.gguf if precision == "auto" else weights.hf, precision, capacity)


def _llamas(weights: Weights, types: list[str], binaries: Path | None, capacity: Capacity) -> Iterator[Server]:
    for kind in types:
        file = weights.gguf
        if binaries is not None and kind != "FILE":
            file = weights.quantised(kind, binaries)
        yield LlamaCpp(binaries, file, kind, capacity)


def _turn(server: Server, workload: list[Case], facts: Facts, seed: int) -> Turn:
    began = time.perf_counter()
    with server.serve() as (pid, address):
        ready_seconds = time.perf_counter() - began
        runs = asyncio.run(_ask(server, address, workload, facts, seed))
        return Turn(
            server=server.name,
            weights=server.weights,
            bits=server.bits,
            weight_bytes=server.weight_bytes(facts),
            ready_seconds=ready_seconds,
            peak_rss_bytes=peak_bytes(pid),
            runs=runs,
        )


async def _ask(server: Server, address: str, workload: list[Case], facts: Facts, seed: int) -> list[CaseRun]:
    runs = []
    async with server.client(address) as client:

        async def run(case: Case, seed: int) -> Run:
            prompts = case.prompts(seed, facts.vocab_size)
            if case.shared_tokens:
                await client.stream(prompts[0][: case.shared_tokens + 1], 1)
            streams = await asyncio.gather(*(client.stream(prompt, case.new_tokens) for prompt in prompts))
            return summarise([each.submitted for each in streams], [each.arrivals for each in streams], [])

        for case in workload:
            _say(f"  {case.name}, {case.streams} streams")
            try:
                await run(case.warm_up(), seed)
                runs.append(CaseRun(case=case, run=await run(case, seed)))
            except (httpx.HTTPError, grpc.RpcError, RuntimeError) as error:
                raise ServerFailedError(f"{case.name}, {case.streams} streams: {error!r}") from error
    return runs


def _transformers(model: Path, workload: list[Case], threads: int, seed: int) -> Turn:
    """A process for each case, whose shape its only batch has; there is no cache that outlives it."""
    runs, reports = [], []
    for case in workload:
        job = Job(
            model=str(model),
            dtype="bfloat16",
            device="cpu",
            threads=threads,
            streams=[case.streams],
            prompt_tokens=case.prompt_tokens,
            new_tokens=case.new_tokens,
            seed=seed,
        )
        done = subprocess.run(
            [sys.executable, "-m", "bench.peers.transformers"],
            input=msgspec.json.encode(job),
            stdout=subprocess.PIPE,
            timeout=TRANSFORMERS_SECONDS,
            check=True,
        )
        reports.append(msgspec.json.decode(done.stdout, type=PeerReport))
        runs.append(CaseRun(case=case, run=reports[-1].runs[0]))
    return Turn(
        server="transformers",
        weights="bf16",
        bits=16,
        weight_bytes=reports[0].weight_bytes,
        ready_seconds=reports[0].load_seconds,
        peak_rss_bytes=max(report.peak_rss_bytes for report in reports),
        runs=runs,
    )


if __name__ == "__main__":
    main()
