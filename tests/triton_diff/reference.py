"""A real Triton Inference Server 2.51 on this machine, on CPU and loopback, from the wheel of nvidia-pytriton.

The wheel (135 MB) goes into a virtual environment of its own below the user's cache folder, once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
from google.protobuf import text_format
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from service.grpc.kserve.management import model_config
from tests.service.grpc.kserve.toys import Toy

PACKAGE = "nvidia-pytriton==0.7.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nemoserve" / "triton-reference"
TWINS = Path(__file__).parent / "models"
READY_SECONDS = 120


@contextlib.contextmanager
def reference(toys: Sequence[Toy], work: Path) -> Iterator[str]:
    """HOST:PORT of a running Triton that serves the twins of the toys; its log is `work`/triton.log.

    Raises:
        RuntimeError: it does not become ready.
    """
    site = _install()
    server = site / "pytriton" / "tritonserver"
    backend = work / "backends" / "python"
    shutil.copytree(server / "backends" / "python", backend)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", backend)
    _write_repository(toys, work / "models")
    http, rpc, metrics = _free_ports(3)
    command = [
        str(server / "bin" / "tritonserver"),
        f"--model-repository={work / 'models'}",
        f"--backend-directory={backend.parent}",
        *(f"--{protocol}-address=127.0.0.1" for protocol in ("http", "grpc", "metrics")),
        f"--http-port={http}",
        f"--grpc-port={rpc}",
        f"--metrics-port={metrics}",
        "--allow-gpu-metrics=false",
    ]
    # The Python backend finds numpy through the `python` on the path, and libpython through the library path.
    libraries = [str(site / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR") or ""]
    environment = os.environ | {
        "PATH": f"{CACHE / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(libraries),
    }
    with (work / "triton.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_ready(f"127.0.0.1:{rpc}", process, work / "triton.log")
            yield f"127.0.0.1:{rpc}"
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _install() -> Path:
    """The site-packages of the environment with the wheel."""
    site = CACHE / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    if not (site / "pytriton" / "tritonserver" / "bin" / "tritonserver").is_file():
        print(f"installing {PACKAGE} into {CACHE}", flush=True)
        venv.create(CACHE, with_pip=True, clear=True)
        subprocess.run([CACHE / "bin" / "python", "-m", "pip", "install", "--quiet", PACKAGE], check=True)
    return site


def _write_repository(toys: Sequence[Toy], repository: Path) -> None:
    for toy in toys:
        folder = repository / toy.spec.name
        (folder / "1").mkdir(parents=True)
        (folder / "config.pbtxt").write_text(text_format.MessageToString(model_config(toy.spec)))
        shutil.copy(TWINS / f"{toy.spec.name}.py", folder / "1" / "model.py")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def _wait_ready(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    limit = time.monotonic() + READY_SECONDS
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        while process.poll() is None and time.monotonic() < limit:
            with contextlib.suppress(grpc.RpcError):
                if stub.ServerReady(pb.ServerReadyRequest(), timeout=1, wait_for_ready=True).ready:
                    return
    raise RuntimeError(f"Triton is not ready:\n{log.read_text()[-2000:]}")
