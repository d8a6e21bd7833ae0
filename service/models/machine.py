"""This machine: as the engine sees it, asked of a process of its own that may import torch, and its surroundings."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from engine.errors import EngineDeadError, error_of
from engine.limits import LEAST_CAPABILITY
from engine.probe import Found, Machine
from engine.wire import Failed

PROBE = (sys.executable, "-P", "-m", "engine.probe")
PROBE_SECONDS = 300.0  # the first time it compiles the kernels; weights of a GGUF file are looked at row by row

GIB = 2**30
SAMPLE_BYTES = 256 * 2**20  # of the model that are read; enough for a disk of 5 GB/s to show itself
SAMPLE_SECONDS = 1.0
_CHUNK = 8 * 2**20


def look(model: Path | None = None, device: str = "auto", dtype: str = "auto", ranks: int = 1) -> Found:
    """What there is here, and what a model's weights would take.

    Args:
        device, dtype: as in EngineConfig.
        ranks: that share the model; it is the weights of one of them that are looked at.

    Raises:
        EngineConfigError: there is no such device here, or so many ranks cannot share the model.
        CheckpointError: the model cannot be opened.
        EngineDeadError: torch cannot be loaded, or the probe does not end.
    """
    command = [*PROBE, f"--device={device}", f"--dtype={dtype}", f"--ranks={ranks}"]
    command += [f"--model={model}"] if model else []
    try:
        done = subprocess.run(command, capture_output=True, timeout=PROBE_SECONDS, check=False)
        answer = msgspec.json.decode(done.stdout, type=Found | Failed)
    except subprocess.TimeoutExpired:
        raise EngineDeadError(f"looking at this machine takes longer than {PROBE_SECONDS:.0f} s") from None
    except msgspec.DecodeError:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise EngineDeadError(f"the engine cannot look at this machine: {last or done.returncode}") from None
    if isinstance(answer, Failed):
        raise error_of(answer.kind, answer.message)
    return answer


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `ok` False: it will trouble a server, and `detail` says what to do; `fatal`: it will not start."""

    name: str
    ok: bool
    detail: str
    fatal: bool = False


def check_machine(machine: Machine, ranks: int = 1) -> list[Check]:
    """Processor, memory, kernels, torch, GPUs, of which each rank that shares a model needs one."""
    cores = f"{machine.cores} core{'s' if machine.cores > 1 else ''}"
    sets = ", ".join(machine.instructions) or "no vector instructions that the kernels know"
    limit = f", the container's limit is {machine.limit_bytes / GIB:.1f}" if machine.limit_bytes else ""
    dtype = {"bfloat16": "bf16", "float32": "fp32"}[machine.dtype]
    return [
        Check("processor", True, f"{machine.cpu}, {cores}; {sets}"),
        Check("memory", True, f"{machine.free_bytes / GIB:.1f} GiB free{limit}"),
        _kernels(machine),
        Check("torch", True, f"{machine.torch}, computes in {dtype} on {machine.device}{_versions(machine)}"),
        *(
            Check("GPU", True, f"{gpu.name}, {gpu.free_bytes / GIB:.1f} of {gpu.memory_bytes / GIB:.1f} GiB free")
            for gpu in machine.gpus
        ),
        *([_gpus(machine, ranks)] if ranks > 1 and machine.device == "cuda" else []),
    ]


def _gpus(machine: Machine, ranks: int) -> Check:
    count = len(machine.gpus)
    return Check("ranks", count >= ranks, f"{ranks} ranks need a GPU each, {count} are here", fatal=True)


def _versions(machine: Machine) -> str:
    found = {"Triton": machine.triton, "CUDA": machine.cuda, "NVIDIA driver": machine.driver}
    return "".join(f"; {name} {version}" for name, version in found.items() if version)


def _kernels(machine: Machine) -> Check:
    if machine.device == "cuda":
        why = machine.triton_lacks
        if why is None and machine.gpus[0].capability < LEAST_CAPABILITY:
            why = f"the GPU is older than compute capability {'.'.join(map(str, LEAST_CAPABILITY))}"
        if why is None:
            return Check("kernels", True, "compiled for the GPU by Triton when a model is loaded")
        return Check("kernels", False, f"{why}; the GPU runs plain torch, several times slower")
    if machine.kernels:
        return Check("kernels", True, f"compiled for this processor by {machine.compiler}")
    why = "there is no C++ compiler (g++ or c++)" if machine.compiler is None else f"{machine.compiler} failed"
    return Check("kernels", False, f"{why}; a CPU runs plain torch, several times slower: install g++")


def check_port(host: str, port: int, name: str = "gRPC port") -> Check:
    """The port can be opened now."""
    where = f"{host}:{port}"
    try:
        plain = host.removeprefix("[").removesuffix("]")
        family, kind, protocol, _, address = socket.getaddrinfo(plain, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what closed a minute ago does not count
            probe.bind(address)
    except OSError as error:
        return Check(name, False, f"{where} cannot be opened: {error.strerror or error}", fatal=True)
    return Check(name, True, f"{where} is free", fatal=True)


def check_store(root: Path, missing_bytes: int) -> Check:
    """The model store can be written, and has room for what is to be fetched."""
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        why = f"{root} cannot be written: {error.strerror}; set NEMOSERVE_CACHE"
        return Check("model store", False, why, fatal=missing_bytes > 0)
    room = f"{root}, {free / 1e9:.1f} GB free"
    if missing_bytes > free:
        why = f"{room}, {missing_bytes / 1e9:.1f} GB to fetch; set NEMOSERVE_CACHE"
        return Check("model store", False, why, fatal=True)
    return Check("model store", True, room + (f", {missing_bytes / 1e9:.1f} GB to fetch" if missing_bytes else ""))


def check_disk(model: Path) -> Check:
    """How fast the weights come from the disk, the page cache put aside where the system lets us."""
    files = [model] if model.is_file() else [path for path in model.rglob("*.safetensors") if path.is_file()]
    if not files:
        return Check("disk", False, f"{model} has no weights")
    largest = max(files, key=lambda path: path.stat().st_size)
    total = sum(path.stat().st_size for path in files)
    try:
        done, seconds = _read(largest)
    except OSError as error:
        return Check("disk", False, f"{largest}: {error.strerror}")
    rate = done / seconds
    return Check("disk", True, f"{rate / 1e6:,.0f} MB/s: {total / 1e9:.2f} GB in {total / rate:.1f} s; {model}")


def _read(path: Path) -> tuple[int, float]:
    """Bytes of the file's beginning that were read, and in how many seconds."""
    file = os.open(path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, 0, SAMPLE_BYTES, os.POSIX_FADV_DONTNEED)
        began, done = time.monotonic(), 0
        while done < SAMPLE_BYTES and time.monotonic() - began < SAMPLE_SECONDS:
            piece = os.read(file, _CHUNK)
            if not piece:
                break
            done += len(piece)
        return done, max(time.monotonic() - began, 1e-6)
    finally:
        os.close(file)
