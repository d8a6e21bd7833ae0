"""What this machine offers the engine: cores, free memory, device and dtype. Containers count: cgroup limits bind."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from engine.errors import EngineConfigError
from engine.limits import LEAST_CAPABILITY

CGROUP = Path("/sys/fs/cgroup")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Cores this process may keep busy: its affinity, and the cgroup's CPU quota rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read(cgroup / "cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        cores = min(cores, -(-int(quota[0]) // int(quota[1])))
    return max(cores, 1)


def free_memory(device: torch.device, cgroup: Path = CGROUP) -> int:
    """Bytes that can still be taken on the device without pushing anything out."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    fields = dict(line.split(":", 1) for line in _read(Path("/proc/meminfo")).splitlines())
    if "MemAvailable" in fields:
        free = int(fields["MemAvailable"].split()[0]) * 1024
    else:  # not Linux
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    limit, used = _read(cgroup / "memory.max").strip(), _read(cgroup / "memory.current").strip()
    if limit.isdigit() and used.isdigit():
        free = min(free, max(int(limit) - int(used), 0))
    return free


def memory_limit(cgroup: Path = CGROUP) -> int | None:
    """Bytes of main memory that this container may use in all, None where nothing limits it."""
    limit = _read(cgroup / "memory.max").strip()
    return int(limit) if limit.isdigit() else None


def choose_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda".

    Raises:
        EngineConfigError: unknown name, or no such device here.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise EngineConfigError(f"device: {name!r} must be auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise EngineConfigError("device: cuda was asked for, but torch sees no CUDA device here")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype; "auto" is bfloat16 where the hardware multiplies it, else float32 (emulation is slower).

    Raises:
        EngineConfigError: unknown name.
    """
    if name == "auto":
        if device.type == "cuda":
            multiplies = torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
        else:
            multiplies = _cpu_multiplies_bfloat16()
        return torch.bfloat16 if multiplies else torch.float32
    if name not in DTYPES:
        raise EngineConfigError(f"dtype: {name!r} must be auto, {' or '.join(DTYPES)}")
    return DTYPES[name]


def cpu() -> tuple[str, frozenset[str]]:
    """Name and instruction sets of the first core, from /proc/cpuinfo; ("CPU", none) where there is no such file."""
    lines = _read(Path("/proc/cpuinfo")).splitlines()[:60]
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags") or fields.get("Features") or ""
    return fields.get("model name", "CPU"), frozenset(flags.split())


def _cpu_multiplies_bfloat16() -> bool:
    return not cpu()[1].isdisjoint(("avx512_bf16", "amx_bf16"))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
