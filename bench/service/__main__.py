"""`python -m bench.service`: what the service costs per streamed token, beside a real Triton.

    each server in turn (A B A B) ──► every path, every number of streams ──► messages/s, CPU per message, lateness

Behind both stands an engine that answers at once: ours in the API process, so that admission, generation, detokeniser,
telemetry and protocols are what is left; Triton's a model of its Python backend that does what Triton's vLLM backend
does with a token. The client is the same process for both and does next to nothing. What CPU seconds say holds on a
machine with other work too; what seconds say does not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec
from rich.console import Console

from bench.measure import this_machine, write_result
from bench.options import names, numbers
from bench.peers.processes import free_port, running, serves
from bench.service.client import Load, Task
from bench.service.report import TRITON, Case, Measured, ServiceCost, show
from bench.service.server import MODEL
from bench.triton import serving
from service.security.keys import add_entry, entry_of, new_key

MODEL_FILE = Path(__file__).with_name("triton_model.py")
OURS, WITH_KEYS = "nemoserve", "nemoserve+keys"
SERVERS = (OURS, WITH_KEYS, TRITON)
PATHS = ("kserve", "typed", "openai")
START_SECONDS = 60.0
CLIENT_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Started:
    """A server that runs: its first process, where each path is, and what requests must bring."""

    pid: int
    addresses: dict[str, str]
    headers: dict[str, str]
    model: str = MODEL


@click.command(context_settings={"show_default": True})
@click.option("--servers", callback=names(SERVERS), default=",".join((OURS, TRITON)), help="who takes part")
@click.option("--paths", callback=names(PATHS), default=",".join(PATHS), help="of ours; Triton has kserve")
@click.option("--streams", callback=numbers, default="1,32,64", help="numbers of streams, each on its own connection")
@click.option("--tokens", type=click.IntRange(2), default=20_000, help="of all streams of a case")
@click.option("--rate", type=click.FloatRange(1), default=1000.0, help="tokens/s of all streams, where there is a pace")
@click.option("--paced-streams", type=click.IntRange(1), default=32, help="how many have a pace")
@click.option("--rounds", type=click.IntRange(1), default=2, help="how often each has its turn")
@click.option("--server-cores", help="that servers may use, as taskset has them; all but the last")
@click.option("--client-cores", help="that the client may use; the last")
@click.option("--json", type=click.Path(path_type=Path), help="write the result here")
def main(
    servers: list[str],
    paths: list[str],
    streams: list[int],
    tokens: int,
    rate: float,
    paced_streams: int,
    rounds: int,
    server_cores: str | None,
    client_cores: str | None,
    json: Path | None,
) -> None:
    """Messages per second and CPU per message of a service whose model takes no time."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a server must not outlive us
    *others, last = sorted(os.sched_getaffinity(0))
    server_cores = server_cores or ",".join(map(str, others or [last]))
    client_cores = client_cores or str(last)
    started_at, machine = datetime.now(UTC).isoformat(timespec="seconds"), this_machine()
    measured: list[Measured] = []
    for number in range(rounds):
        for pace in (0.0, paced_streams / rate):
            for name in servers:
                print(f"round {number + 1} of {rounds}: {name}, pace {1000 * pace:g} ms", file=sys.stderr, flush=True)
                with _start(name, pace, ["taskset", "-c", server_cores]) as server:
                    for path in paths if name != TRITON else ["kserve"]:
                        for count in [paced_streams] if pace else streams:
                            load = _measure(server, path, count, max(2, tokens // count), client_cores)
                            case = Case(server=name, path=path, streams=count, pace_seconds=pace)
                            measured.append(Measured(case=case, load=load))
    result = ServiceCost(
        started_at=started_at,
        machine=machine,
        server_cores=server_cores,
        client_cores=client_cores,
        tokens=tokens,
        measured=measured,
    )
    if json is not None:
        write_result(json, result)
    show(result, Console())


@contextlib.contextmanager
def _start(name: str, pace: float, start_with: Sequence[str]) -> Iterator[Started]:
    with tempfile.TemporaryDirectory(prefix="bench-service-") as folder:
        if name == TRITON:
            _write_model(Path(folder) / MODEL, pace)
            with serving(Path(folder), start_with) as (pid, address):
                yield Started(pid, {"kserve": address}, {})
            return
        rpc, http = free_port(), free_port()
        command = [*start_with, sys.executable, "-m", "bench.service.server", f"--pace={pace}"]
        command += [f"--grpc-port={rpc}", f"--http-port={http}"]
        headers = {}
        if name == WITH_KEYS:
            key, file = new_key(), Path(folder) / "keys.yaml"
            add_entry(file, entry_of("bench", key, admin=False))
            command += [f"--keys={file}"]
            headers["authorization"] = f"Bearer {key}"
        grpc_address, http_address = f"127.0.0.1:{rpc}", f"127.0.0.1:{http}"
        with running(command, lambda: serves(grpc_address), START_SECONDS) as pid:
            yield Started(pid, {"kserve": grpc_address, "typed": grpc_address, "openai": http_address}, headers)


def _write_model(folder: Path, pace: float) -> None:
    """A folder of Triton's model repository."""
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_bytes(MODEL_FILE.read_bytes())
    inputs = {"text_input": "TYPE_STRING", "stream": "TYPE_BOOL", "sampling_parameters": "TYPE_STRING"}
    tensors = ", ".join(f'{{ name: "{name}" data_type: {kind} dims: [1] }}' for name, kind in inputs.items())
    (folder / "config.pbtxt").write_text(f"""
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
input [ {tensors} ]
output [ {{ name: "text_output" data_type: TYPE_STRING dims: [-1] }} ]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
parameters {{ key: "pace" value {{ string_value: "{pace}" }} }}
""")


def _measure(server: Started, path: str, streams: int, tokens: int, cores: str) -> Load:
    """By a client in a process of its own, which warms up first."""
    task = Task(
        path=path,
        address=server.addresses[path],
        server=server.pid,
        model=server.model,
        streams=streams,
        tokens=tokens,
        headers=server.headers,
    )
    done = subprocess.run(
        ["taskset", "-c", cores, sys.executable, "-m", "bench.service.client"],
        input=msgspec.json.encode(task),
        stdout=subprocess.PIPE,
        timeout=CLIENT_SECONDS,
        check=True,
    )
    return msgspec.json.decode(done.stdout, type=Load)


if __name__ == "__main__":
    main()
