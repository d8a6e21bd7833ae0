"""What the engine finds on this machine, and what a model's weights would take: `python -m engine.probe` prints it.

A program of its own, because the answers need torch and who asks (`nemoserve doctor`) never imports it: the types here
are all that both sides share. One JSON object on stdout: `Found`, or `Failed` with the engine's own error.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from engine.config import ModelConfig
from engine.errors import EngineConfigError, EngineError
from engine.schemes import SCHEMES
from engine.wire import Failed

if TYPE_CHECKING:
    import torch

    from engine.checkpoint import Checkpoint
    from engine.model.load import TensorSource

_DRIVER = Path("/proc/driver/nvidia/version")
# That the kernels are compiled for, or that oneDNN uses, where a CPU has them; as /proc/cpuinfo spells them.
INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd")


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """A CUDA device. `free_bytes` is after the context of a process was made."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    free_bytes: int


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to run on.

    Attributes:
        cores: that this process may keep busy.
        free_bytes, limit_bytes: of main memory; the limit is the container's, None where there is none.
        compiler: path, None where there is none.
        kernels: the engine's own are compiled and loaded; without them a CPU runs plain torch.
        triton_lacks: what Triton misses to run kernels on a GPU, which then runs plain torch; None = nothing.
        triton, cuda, driver: versions; None = it is not here. `cuda` is what torch was built for, `driver` NVIDIA's.
        device, dtype: what the engine would take for the ones asked for.
    """

    cpu: str
    cores: int
    instructions: tuple[str, ...]
    free_bytes: int
    limit_bytes: int | None
    torch: str
    compiler: str | None
    kernels: bool
    triton_lacks: str | None
    device: str
    dtype: str
    gpus: tuple[Gpu, ...]
    triton: str | None = None
    cuda: str | None = None
    driver: str | None = None


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint that was opened.

    Attributes:
        parameters: numbers stored, a tied head counted once.
        nbytes: what the weights of a rank take in each precision of `engine.schemes.SCHEMES`.
        refused: precision -> why this file cannot be kept so; all of them where so many ranks cannot share the model.
    """

    model: ModelConfig
    parameters: int
    nbytes: dict[str, int]
    refused: dict[str, str]


class Found(msgspec.Struct, frozen=True, tag=True):
    machine: Machine
    weights: Weights | None


def main() -> int:
    parser = argparse.ArgumentParser(prog="engine.probe", description=__doc__)
    parser.add_argument("--model", help="a checkpoint to open")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--ranks", type=int, default=1, help="that share the model")
    arguments = parser.parse_args()
    answer: Found | Failed
    try:
        answer = probe(arguments.device, arguments.dtype, arguments.model, arguments.ranks)
    except EngineError as error:
        answer = Failed(type(error).__name__, str(error))
    sys.stdout.buffer.write(msgspec.json.encode(answer))
    return 0


def probe(device_name: str, dtype_name: str, model: str | None, ranks: int = 1) -> Found:
    """Look at this machine, and into the files of a model. Imports torch.

    Raises:
        EngineConfigError: there is no such device or dtype here.
        CheckpointError: the model cannot be opened.
    """
    from engine.checkpoint import open_checkpoint
    from engine.machine import choose_device, choose_dtype

    device = choose_device(device_name)
    dtype = choose_dtype(dtype_name, device)
    weights = None
    if model is not None:
        with open_checkpoint(model) as checkpoint:
            weights = _weights(checkpoint, dtype, ranks)
    return Found(_machine(device, dtype), weights)


def _machine(device: torch.device, dtype: torch.dtype) -> Machine:
    import torch

    from engine.machine import cpu, free_memory, memory_limit, usable_cores
    from engine.ops import find_compiler, load_kernels, triton_lacks

    cores = usable_cores()
    name, flags = cpu()
    return Machine(
        cpu=name,
        cores=cores,
        instructions=tuple(each for each in INSTRUCTIONS if each in flags),
        free_bytes=free_memory(torch.device("cpu")),
        limit_bytes=memory_limit(),
        torch=str(torch.__version__),
        compiler=find_compiler(),
        kernels=load_kernels(cores) is not None,
        triton_lacks=triton_lacks(),
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        gpus=tuple(_gpu(index) for index in range(torch.cuda.device_count())),
        triton=_version("triton"),
        cuda=torch.version.cuda,
        driver=driver_version(_DRIVER),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_version(path: Path) -> str | None:
    """Of NVIDIA's kernel module, from the first line of what it shows of itself."""
    try:
        found = re.search(r"Kernel Module\b.*?\s(\d+(?:\.\d+)+)\s", path.read_text())
    except OSError:
        return None
    return found[1] if found else None


def _gpu(index: int) -> Gpu:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    return Gpu(
        name=torch.cuda.get_device_name(index),
        capability=torch.cuda.get_device_capability(index),
        memory_bytes=total,
        free_bytes=free,
    )


def _weights(checkpoint: Checkpoint, dtype: torch.dtype, ranks: int) -> Weights:
    from engine.model.footprint import checkpoint_bytes
    from engine.parallel.checkpoint import RankCheckpoint

    nbytes, refused = {}, {}
    try:
        source = _FirstRows(checkpoint if ranks == 1 else RankCheckpoint(checkpoint, 0, ranks))
        for precision, scheme in SCHEMES.items():
            try:
                nbytes[precision] = checkpoint_bytes(source, scheme, dtype)
            except EngineError as error:
                refused[precision] = str(error)
    except EngineConfigError as error:
        refused = dict.fromkeys(SCHEMES, str(error))
    return Weights(model=checkpoint.config, parameters=checkpoint.num_parameters, nbytes=nbytes, refused=refused)


class _FirstRows:
    """A checkpoint whose matrices are looked at once, however many precisions are asked about."""

    def __init__(self, checkpoint: TensorSource) -> None:
        self.config = checkpoint.config
        self.read, self.stored_bytes = checkpoint.read, checkpoint.stored_bytes
        self.matrix = functools.cache(checkpoint.matrix)


if __name__ == "__main__":
    sys.exit(main())
