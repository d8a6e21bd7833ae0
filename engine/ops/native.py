"""Compiles the C++ kernels of this folder for this very CPU on first use and keeps the library in the user's cache.

A file name carries a hash of all that decides its contents (sources, flags, compiler, CPU), so a stale library is never
loaded; it appears by an atomic rename, so that concurrent starts are safe. The kernels share torch's OpenMP
runtime: two thread pools on the same cores would fight.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("*.cpp"))
FLAGS = [
    *("-std=c++20", "-O3", "-fopenmp", "-shared", "-fPIC"),
    # Let a*b+c fuse and branches become selects; NaN and infinity keep their meaning (so no -ffast-math).
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
]
# 13 s of one core. Who starts while others have nearly all of the machine shall not go without kernels ever after.
COMPILE_SECONDS = 900.0
_POINTER, _INT64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
SIGNATURES: dict[str, list[type]] = {
    "nemo_linear": [_INT, _INT, *[_POINTER] * 4, _INT64, _INT],
    "nemo_pack": [*[_POINTER] * 2, *[_INT64] * 3, _INT],
    "nemo_use_huge_pages": [_POINTER, _INT64, _INT],
    "nemo_quantise_rows": [_INT, *[_POINTER] * 3, *[_INT64] * 2, _FLOAT, _INT],
    "nemo_add_rms_norm": [_INT, *[_POINTER] * 4, *[_INT64] * 2, _FLOAT, _INT],
    "nemo_silu_mul": [_INT, *[_POINTER] * 2, *[_INT64] * 2, _INT],
    "nemo_rope_and_write": [_INT, *[_POINTER] * 8, *[_INT64] * 5, _INT],
    "nemo_attention": [_INT, *[_POINTER] * 9, *[_INT64] * 8, _INT],
    "nemo_layers": [_INT, _POINTER, _INT64, *[_POINTER] * 3, _INT],
}


def default_cache() -> Path:
    return Path.home() / ".cache" / "nemoserve" / "kernels"


@dataclass(frozen=True)
class Kernels:
    """The compiled library with its argument types declared, and the threads that each call may use."""

    library: ctypes.CDLL
    threads: int

    @property
    def multiplies_bfloat16(self) -> bool:
        """This CPU has dot products of bfloat16; elsewhere the kernels widen it to float32 first."""
        return bool(self.library.nemo_multiplies_bfloat16())


def find_compiler() -> str | None:
    """Path of the C++ compiler, None where there is none."""
    return shutil.which("g++") or shutil.which("c++")


def load_kernels(threads: int, cache: Path | None = None, architecture: str = "native") -> Kernels | None:
    """The kernels for this CPU, or None (and one warning) where they cannot be built.

    Args:
        threads: torch's own intra-op threads; the same pool runs both.
        cache: folder of compiled libraries; created if absent. Default: `default_cache()`.
        architecture: the compiler's -march.
    """
    compiler = find_compiler()
    if compiler is None:
        log.warning("no C++ compiler: CPU kernels fall back to plain torch, which is several times slower")
        return None
    try:
        library = ctypes.CDLL(str(_build(compiler, cache or default_cache(), [*FLAGS, f"-march={architecture}"])))
    except (OSError, subprocess.SubprocessError) as error:
        detail = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        log.warning("CPU kernels fall back to plain torch, which is several times slower: %s", str(detail).strip())
        return None
    for name, arguments in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return Kernels(library, threads)


def _build(compiler: str, cache: Path, flags: list[str]) -> Path:
    """Path of the library for this source, compiler and CPU; compiled now unless it is there."""
    openmp = [str(path) for path in sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))[:1]]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    texts = [path.read_text() for path in (*SOURCES, *sorted(FOLDER.glob("*.h")))]
    recipe = [*texts, *flags, *openmp, version, _cpu_model()]
    target = cache / f"cpu_kernels-{hashlib.sha256(chr(0).join(recipe).encode()).hexdigest()[:20]}.so"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    # torch's libgomp comes before the one that -fopenmp appends, which --as-needed then drops.
    runtime = ["-Wl,--as-needed", *openmp, *(f"-Wl,-rpath,{Path(path).parent}" for path in openmp)]
    with tempfile.TemporaryDirectory(dir=cache, suffix=".tmp") as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(name)
        objects = [folder / f"{source.stem}.o" for source in SOURCES]
        compiles = [
            [compiler, *flags, "-c", str(source), "-o", str(o)] for source, o in zip(SOURCES, objects, strict=True)
        ]
        list(pool.map(_run, compiles))  # side by side: 13 s of one core
        _run([compiler, *flags, *map(str, objects), "-o", str(folder / target.name), *runtime])
        os.chmod(folder / target.name, 0o700)
        os.replace(folder / target.name, target)
    return target


def _run(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=True)


def _cpu_model() -> str:
    """What -march=native depends on: a cache folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "".join(next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags"))
