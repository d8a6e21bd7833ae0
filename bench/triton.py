"""A real Triton Inference Server 2.51 on this machine, on CPU and loopback, from the wheel of nvidia-pytriton.

The wheel (135 MB) goes into a virtual environment of its own below the user's cache folder, once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from bench.peers.processes import free_port, running

PACKAGE = "nvidia-pytriton==0.7.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nemoserve" / "triton-reference"
READY_SECONDS = 120.0


@contextlib.contextmanager
def serving(models: Path, start_with: Sequence[str] = ()) -> Iterator[tuple[int, str]]:
    """The process and the HOST:PORT (gRPC) of a Triton that serves a repository of models; installs what is missing.

    Args:
        start_with: goes before its command, such as `taskset`.

    Raises:
        ServerFailedError: it does not become ready.
    """
    site = install()
    server = site / "pytriton" / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    address = f"127.0.0.1:{free_port()}"
    # The Python backend finds numpy through the `python` on the path, and libpython through the library path.
    libraries = [str(site / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR") or ""]
    env = {"PATH": f"{CACHE / 'bin'}:{os.environ['PATH']}", "LD_LIBRARY_PATH": ":".join(libraries)}
    with tempfile.TemporaryDirectory(prefix="triton-") as work:
        backend = Path(work) / "python"
        shutil.copytree(server / "backends" / "python", backend)
        shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", backend)
        command = [
            *start_with,
            str(server / "bin" / "tritonserver"),
            f"--model-repository={models}",
            f"--backend-directory={work}",
            *(f"--{protocol}-address=127.0.0.1" for protocol in ("http", "grpc", "metrics")),
            f"--http-port={free_port()}",
            f"--grpc-port={address.rpartition(':')[2]}",
            f"--metrics-port={free_port()}",
            "--allow-gpu-metrics=false",
        ]
        with running(command, lambda: _is_ready(address), READY_SECONDS, env) as pid:
            yield pid, address


def _is_ready(address: str) -> bool:
    with grpc.insecure_channel(address) as channel, contextlib.suppress(grpc.RpcError):
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return bool(stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=1, wait_for_ready=True).ready)
    return False


def install() -> Path:
    """The site-packages of the environment with the wheel."""
    site = CACHE / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    if not (site / "pytriton" / "tritonserver" / "bin" / "tritonserver").is_file():
        print(f"installing {PACKAGE} into {CACHE}", file=sys.stderr, flush=True)
        venv.create(CACHE, with_pip=True, clear=True)
        subprocess.run([CACHE / "bin" / "python", "-m", "pip", "install", "--quiet", PACKAGE], check=True)
    return site
