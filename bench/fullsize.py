"""`python -m bench.fullsize`: Mistral NeMo 12B at its real size, random weights, served through gRPC on this machine.

    write checkpoint ──► nemoserve serve, cold page cache ──► seconds, memory ──► streams ──► tokens/s beside the limit

The limit is what memory bandwidth allows: a decode step of one stream reads every weight but the embedding table once.
Bandwidth is measured in the same run, before the model takes the memory.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import click
import grpc
import msgspec
import torch
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc

from bench.checkpoints import FORMS, write_checkpoint
from bench.limits import measure_bandwidth
from bench.measure import (
    Bandwidth,
    Machine,
    Run,
    anonymous_bytes,
    children,
    peak_rss_bytes,
    summarise,
    this_machine,
    write_result,
)
from bench.options import numbers
from bench.peers.servers import greedy_request
from bench.vocabularies import TEKKEN, mistral_file
from engine.checkpoint import open_checkpoint
from engine.memory import matrices, token_bytes
from engine.model.footprint import checkpoint_bytes, matrix_bytes
from engine.schemes import SCHEMES
from service.models.family import NEMO_12B

SCHEMA = 1
READY = re.compile(r"is ready at (\S+) \(gRPC\)")


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What is served and asked. `layers` is less than 40 only for a trial run."""

    form: str
    precision: str
    kv_precision: str
    layers: int
    streams: list[int]
    prompt_tokens: int
    new_tokens: int
    threads: int


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """From the checkpoint, by the engine's own arithmetic.

    Attributes:
        streamed_bytes: of the weights that a decode step reads: all but the embedding table.
        kv_token_bytes: of one token in the KV cache.
    """

    parameters: int
    file_bytes: int
    weight_bytes: int
    streamed_bytes: int
    kv_token_bytes: int


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Of the engine's process. Anonymous memory is what nobody can take back; the rest are pages of files.

    Attributes:
        peak_rss_bytes: until the end of the run.
        loaded_anonymous_bytes: once the model was ready.
        peak_anonymous_bytes: largest that was seen every 50 ms while loading.
    """

    peak_rss_bytes: int
    loaded_anonymous_bytes: int
    peak_anonymous_bytes: int


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A result file.

    Attributes:
        write_seconds: to make the checkpoint.
        disk_bytes_per_second: reading the first GB of it past the page cache.
        ready_seconds: from starting `nemoserve serve` until a request is accepted; nothing of the file was cached.
    """

    schema: int = SCHEMA
    started_at: str
    machine: Machine
    bandwidth: Bandwidth
    job: Job
    sizes: Sizes
    write_seconds: float
    disk_bytes_per_second: float
    ready_seconds: float
    memory: Memory
    runs: list[Run]


@click.command(context_settings={"show_default": True})
@click.option("--form", type=click.Choice(FORMS), default="gguf-q4_k_m", help="of the checkpoint's files")
@click.option("--precision", type=click.Choice(list(SCHEMES)), default="auto", help="as nemoserve serve takes it")
@click.option("--kv-precision", type=click.Choice(["auto", "bf16", "fp8"]), default="auto", help="likewise")
@click.option("--layers", type=click.IntRange(1, 40), default=40, help="fewer, to try the program")
@click.option("--streams", callback=numbers, default="1,4", help="numbers of concurrent requests")
@click.option("--prompt-tokens", type=click.IntRange(1), default=64, help="tokens of each prompt")
@click.option("--new-tokens", type=click.IntRange(2), default=32, help="tokens to generate per request")
@click.option("--threads", type=click.IntRange(1), default=len(os.sched_getaffinity(0)), help="of the engine")
@click.option("--timeout", default=1800.0, help="seconds until the server must be ready")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=tempfile.gettempdir(),
    help="where the checkpoint lies meanwhile: 7.5, 13.6 or 24.5 GB",
)
@click.option("--json", type=click.Path(path_type=Path), help="also write the result to this file")
def main(
    form: str,
    precision: str,
    kv_precision: str,
    layers: int,
    streams: list[int],
    prompt_tokens: int,
    new_tokens: int,
    threads: int,
    timeout: float,
    folder: Path,
    json: Path | None,
) -> None:
    """Serve a full-size random NeMo and measure loading, memory and tokens/s."""
    job = Job(
        form=form,
        precision=precision,
        kv_precision=kv_precision,
        layers=layers,
        streams=streams,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        threads=threads,
    )
    with tempfile.TemporaryDirectory(prefix="nemo-", dir=folder) as inside:
        result = measure(job, Path(inside) / "checkpoint", timeout)
    if json is not None:
        write_result(json, result)
    show(result)


def measure(job: Job, folder: Path, timeout: float) -> Result:
    """Do all of it.

    Args:
        folder: for the checkpoint; must not exist.
        timeout: seconds until the server must be ready.
    """
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    machine, bandwidth = this_machine(), measure_bandwidth(job.threads)
    _say(f"writing {job.form} checkpoint")
    began = time.perf_counter()
    model, tekken = msgspec.structs.replace(NEMO_12B, num_layers=job.layers), mistral_file(TEKKEN)
    path = write_checkpoint(job.form, folder, model, tekken)
    write_seconds = time.perf_counter() - began
    files = [each for each in folder.iterdir() if each.suffix in (".safetensors", ".gguf")]
    _leave_page_cache(files)
    sizes = _sizes(path, job, sum(each.stat().st_size for each in files))
    disk = _disk_speed(max(files, key=lambda each: each.stat().st_size))
    _leave_page_cache(files)
    began = time.perf_counter()
    with _serving(path, job, timeout) as server:
        ready_seconds = time.perf_counter() - began
        loaded = anonymous_bytes(server.engine_pid)
        runs = []
        with grpc.insecure_channel(server.address) as channel:
            stub = rpc.GenerationServiceStub(channel)
            for streams in job.streams:
                _say(f"{streams} streams")
                runs.append(_run(stub, job, streams))
        memory = Memory(
            peak_rss_bytes=peak_rss_bytes(server.engine_pid),
            loaded_anonymous_bytes=loaded,
            peak_anonymous_bytes=server.peak_anonymous_bytes,
        )
    return Result(
        started_at=started_at,
        machine=machine,
        bandwidth=bandwidth,
        job=job,
        sizes=sizes,
        write_seconds=write_seconds,
        disk_bytes_per_second=disk,
        ready_seconds=ready_seconds,
        memory=memory,
        runs=runs,
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _sizes(path: Path, job: Job, file_bytes: int) -> Sizes:
    scheme, dtype = SCHEMES[job.precision], torch.bfloat16
    with open_checkpoint(str(path)) as checkpoint:
        weights = checkpoint_bytes(checkpoint, scheme, dtype)
        embedding = next(matrices(checkpoint.config))
        return Sizes(
            parameters=checkpoint.num_parameters,
            file_bytes=file_bytes,
            weight_bytes=weights,
            streamed_bytes=weights - matrix_bytes(checkpoint, embedding, scheme.embedding, dtype),
            kv_token_bytes=token_bytes(checkpoint.config, job.kv_precision, dtype.itemsize),
        )


def _leave_page_cache(files: list[Path]) -> None:
    """Write back, and drop what the kernel keeps of the files, so that they are read from the disk."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _disk_speed(file: Path) -> float:
    """Bytes per second of reading at most the first 10**9 bytes in order."""
    piece, read = bytearray(2**24), 0
    with file.open("rb", buffering=0) as opened:
        began = time.perf_counter()
        while read < 10**9 and (count := opened.readinto(piece)):
            read += count
        return read / (time.perf_counter() - began)


class _Server:
    """`nemoserve serve` in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.address = ""
        self.engine_pid = 0
        self.peak_anonymous_bytes = 0
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)

    def wait_until_ready(self) -> None:
        self._watch.start()
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := READY.search(line):
                self.address = found[1]
                self.done()
                return
            if line.startswith(("nemoserve", "ERROR")):
                _say(line.rstrip())
        raise SystemExit(f"the server ended with status {self.process.wait()} before it was ready")

    def done(self) -> None:
        """Stop looking at the memory."""
        self._done.set()

    def _look(self) -> None:
        while not self._done.wait(0.05):
            with contextlib.suppress(OSError, StopIteration):
                self.engine_pid = self.engine_pid or next(_engines(self.process.pid))
                self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, anonymous_bytes(self.engine_pid))


@contextlib.contextmanager
def _serving(path: Path, job: Job, timeout: float) -> Iterator[_Server]:
    command = [str(Path(sys.executable).parent / "nemoserve"), "serve", str(path), "--grpc-port", "0"]
    command += ["--http-port", "off"]
    command += ["--precision", job.precision, "--kv-precision", job.kv_precision, "--threads", str(job.threads)]
    command += ["--max-model-len", str(max(256, job.prompt_tokens + job.new_tokens))]
    command += ["--max-batch-size", str(max(4, *job.streams)), "--served-model-name", "mistral-nemo-12b-random"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    server = _Server(process)
    killer = threading.Timer(timeout, process.kill)
    killer.start()
    try:
        server.wait_until_ready()
        killer.cancel()
        yield server
    finally:
        killer.cancel()
        server.done()
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _engines(pid: int) -> Iterator[int]:
    """Processes that run `engine.worker` for this server."""
    for child in children(pid):
        if b"engine.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
            yield child


def _run(stub: rpc.GenerationServiceStub, job: Job, streams: int) -> Run:
    rng = random.Random(streams)
    prompts = [[rng.randrange(1000, 131072) for _ in range(job.prompt_tokens)] for _ in range(streams)]
    with ThreadPoolExecutor(streams) as pool:
        measured = list(pool.map(lambda prompt: _stream(stub, prompt, job.new_tokens), prompts))
    submitted, arrivals, first = zip(*measured, strict=True)
    return summarise(submitted, arrivals, first)


def _stream(stub: rpc.GenerationServiceStub, prompt: list[int], new_tokens: int) -> tuple[float, list[float], int]:
    """When the request was sent, when each token came, and the first of them."""
    submitted = time.perf_counter()
    arrivals: list[float] = []
    tokens: list[int] = []
    for response in stub.Generate(greedy_request(prompt, new_tokens)):
        if response.HasField("delta"):
            tokens += response.delta.token_ids
            arrivals += [time.perf_counter()] * len(response.delta.token_ids)
        elif response.HasField("finished") and response.finished.reason != pb.FINISH_REASON_LENGTH:
            raise SystemExit(f"a request ended by {pb.FinishReason.Name(response.finished.reason)}")
    if len(tokens) != new_tokens:
        raise SystemExit(f"a request gave {len(tokens)} tokens and not {new_tokens}")
    return submitted, arrivals, tokens[0]


def show(result: Result) -> None:
    """What was measured, in lines for people."""
    job, sizes, memory = result.job, result.sizes, result.memory
    read = result.bandwidth.read_bytes_per_second
    limit = read / sizes.streamed_bytes
    click.echo(f"{sizes.parameters:,} parameters, {job.form}, precision {job.precision}, KV cache {job.kv_precision}")
    click.echo(
        f"files {sizes.file_bytes / 1e9:.2f} GB, weights in memory {sizes.weight_bytes / 1e9:.2f} GB, "
        f"{sizes.kv_token_bytes / 1024:.1f} KiB of KV cache per token"
    )
    click.echo(
        f"ready after {result.ready_seconds:.1f} s from a cold page cache: "
        f"{sizes.file_bytes / result.ready_seconds / 1e9:.2f} GB/s of file; "
        f"the disk alone reads {result.disk_bytes_per_second / 1e9:.2f} GB/s"
    )
    click.echo(
        f"anonymous memory of the engine: {memory.loaded_anonymous_bytes / 1e9:.2f} GB when ready, at most "
        f"{memory.peak_anonymous_bytes / 1e9:.2f} GB while loading (weights "
        f"{(memory.peak_anonymous_bytes - sizes.weight_bytes) / 2**30:+.2f} GiB); peak RSS with file pages "
        f"{memory.peak_rss_bytes / 1e9:.2f} GB"
    )
    click.echo(f"memory reads {read / 1e9:.1f} GB/s: at most {limit:.2f} tokens/s for one stream")
    for run in result.runs:
        step = 1 / run.itl_p50_seconds
        click.echo(
            f"{run.streams:3} streams: {run.tokens_per_second:.2f} tokens/s with the prompts of {job.prompt_tokens}, "
            f"TTFT p50 {run.ttft_p50_seconds:.2f} s, ITL p50 {1000 * run.itl_p50_seconds:.0f} ms = "
            f"{run.streams * step:.2f} tokens/s, weights at {sizes.streamed_bytes * step / 1e9:.1f} GB/s "
            f"({step / limit:.0%} of the limit)"
        )


if __name__ == "__main__":
    main()
