"""The images for CPUs and of the operator, built and run as the chart runs them: `make image-test`. Outside of
`make test`: it needs root, Debian's buildah, podman, runc and debootstrap, curl, 8 GB of disk and some minutes.
`python -m tests.image autoscaler` builds and runs the operator's alone.

The base is bootstrapped from Debian's packages, so that no registry is needed; BASE=IMAGE takes another. BUILD_ARGS go
to `buildah build`, a package index of one's own, say, and STORE is a model store, writable for group 0.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from autoscaler.cluster.face import QUEUE_AUTOSCALERS
from helm.chart import objects, render
from helm.tools import HELMS
from tests.autoscaler.fake_api import FakeApi
from tests.autoscaler.observe.replicas import free_port
from tests.helm.conftest import one, rendered, server
from tests.helm.test_operator import NAME, container
from tests.helm.test_operator_runs import ACCOUNT, bring

ROOT = Path(__file__).resolve().parents[1]
IMAGE, OPERATOR = "localhost/nemoserve:test", "localhost/nemoserve-autoscaler:test"
TARGETS = {"server-cpu": IMAGE, "autoscaler": OPERATOR}
PACKAGES = "python3.11,python3.11-venv,python3-distutils,python3-lib2to3,python-is-python3,ca-certificates"
COMPILER = {"server-cpu": ",g++", "autoscaler": ""}  # what the Dockerfile would install
SETTINGS = """\
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
HARDENED = (
    *("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--network=host"),
    *("--tmpfs=/tmp", "--tmpfs=/home/nemoserve:exec,mode=1777"),
)
ANY_USER = "12345:0"  # as OpenShift gives them out
READY_SECONDS = 600
OPERATOR_BYTES = 150e6  # that a registry sends
PORTS = {"NEMOSERVE_HTTP_PORT": "18000", "NEMOSERVE_GRPC_PORT": "18001"}
POLICY = {"default": [{"type": "insecureAcceptAnything"}]}


class Builder:
    """buildah and podman with settings, images and containers below `folder` alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "containers.conf").write_text(SETTINGS)
        roots = f'graphroot = "{folder}/images"\nrunroot = "{folder}/run"\n'
        (folder / "storage.conf").write_text(f'[storage]\ndriver = "overlay"\n{roots}')
        (folder / "policy.json").write_text(json.dumps(POLICY))
        conf = {"CONTAINERS_CONF": "containers.conf", "CONTAINERS_STORAGE_CONF": "storage.conf"}
        self._environ = {**os.environ, **{name: str(folder / file) for name, file in conf.items()}}

    def run(self, *command: str, check: bool = True, quiet: bool = False) -> str:
        if not quiet:
            print("$", shlex.join(command), flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=self._environ, timeout=1800, check=check)
        return done.stdout.strip()

    def bootstrap(self, target: str) -> str:
        """A base image of Debian's own packages."""
        root, image = self._folder / f"root-{target}", f"localhost/python:{target}"
        packages = PACKAGES + COMPILER[target]
        self.run("debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(root))
        archive = self._folder / f"{target}.tar"
        exclude = [f"--exclude=./{each}" for each in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc")]
        self.run("tar", "--directory", str(root), *exclude, "--create", "--file", str(archive), ".")
        self.run("podman", "import", str(archive), image)
        return image

    def build(self, base: str, target: str) -> None:
        policy = f"--signature-policy={self._folder / 'policy.json'}"
        options = ["--isolation=chroot", policy, f"--target={target}", f"--tag={TARGETS[target]}"]
        extra = shlex.split(os.environ.get("BUILD_ARGS", ""))
        self.run("buildah", "build", *options, f"--build-arg=PYTHON_IMAGE={base}", *extra, str(ROOT))


def check(builder: Builder, folder: Path) -> None:
    """Run it with the chart's configuration and the least rights; ask it; tell it to end."""
    found = rendered("cpu")
    (folder / "config").mkdir()
    (folder / "config" / "nemoserve.yaml").write_text(one(found, "ConfigMap")["data"]["nemoserve.yaml"])
    if not (store := os.environ.get("STORE")):
        store = str(folder / "store")
        os.mkdir(store)
        os.chmod(store, 0o770)  # of group 0, as a volume is of fsGroup
    environ = [f"--env={name}={value}" for name, value in {**PORTS, "NEMOSERVE_CACHE": "/model-store"}.items()]
    volumes = [f"--volume={folder}/config:/etc/nemoserve/config:ro", f"--volume={store}:/model-store"]
    options = [*HARDENED, f"--user={ANY_USER}", *environ, *volumes]
    name = builder.run("podman", "run", "--detach", *options, IMAGE, *server(found)["args"])
    try:
        wait(builder, name)
        [tester] = one(found, "Pod")["spec"]["containers"]
        asked = [each.replace("nemo-nemoserve:8001", "127.0.0.1:18001") for each in tester["args"]]
        answer = builder.run("podman", "run", "--rm", *HARDENED, "--user=1000:1000", "--env=HOME=/tmp", IMAGE, *asked)
        assert answer, "no answer"
        print(answer)
        builder.run("podman", "stop", "--time=30", name)
        code = builder.run("podman", "inspect", name, "--format={{.State.ExitCode}}")
        assert code == "0", f"SIGTERM ended it with {code}"
    finally:
        print(builder.run("podman", "logs", name, check=False))
        builder.run("podman", "rm", "--force", name, check=False)


def bill(builder: Builder, image: str) -> set[str]:
    """What the image lists that is in it."""
    command = ("podman", "run", "--rm", "--network=host", "--entrypoint=cat", image, "/opt/nemoserve/sbom.json")
    return {each["name"] for each in json.loads(builder.run(*command))["components"]}


def check_size(builder: Builder, image: str, folder: Path) -> None:
    """Of the operator's: what a registry sends (gzip), and how much of it is above the base."""
    builder.run("podman", "push", image, f"dir:{folder}", "--compress")
    layers = [each["size"] for each in json.loads((folder / "manifest.json").read_text())["layers"]]
    whole = int(builder.run("podman", "inspect", image, "--format={{.Size}}"))
    above = f"{layers[-1] / 1e6:.0f} MB of it above the base"
    print(f"{sum(layers) / 1e6:.0f} MB as it is sent, {above}; {whole / 1e6:.0f} MB on a disk")
    assert sum(layers) < OPERATOR_BYTES


async def check_operator(builder: Builder, folder: Path) -> None:
    """Run it with the chart's arguments, rights and limits; it leads, looks after its resource, and ends when told."""
    found = objects(render(HELMS[-1], None, "--set", "autoscaling.enabled=true"))
    async with FakeApi() as api:
        bring(api, found, replicas=1)
        config = api.kubeconfig(folder, ACCOUNT, "serving")
        config.chmod(0o644)
        options = [*HARDENED, f"--user={ANY_USER}", "--memory=512m", f"--volume={config}:/kubeconfig:ro"]
        here = ["--kubeconfig=/kubeconfig", "--namespace=serving", f"--metrics-port={free_port()}"]
        args = [*container(found)["args"], *here]
        name = await asyncio.to_thread(builder.run, "podman", "run", "--detach", *options, OPERATOR, *args)
        try:
            await api.until(lambda: "status" in api.get(QUEUE_AUTOSCALERS, NAME, "serving"), READY_SECONDS)
            async with httpx.AsyncClient() as client:
                ready = await client.get(f"http://127.0.0.1:{here[-1].partition('=')[2]}/readyz")
            assert ready.text == "ok, leads\n", ready.text
            await asyncio.to_thread(builder.run, "podman", "stop", "--time=30", name)
            code = await asyncio.to_thread(builder.run, "podman", "inspect", name, "--format={{.State.ExitCode}}")
            assert code == "0", f"SIGTERM ended it with {code}"
        finally:
            print(await asyncio.to_thread(builder.run, "podman", "logs", name, check=False))
            await asyncio.to_thread(builder.run, "podman", "rm", "--force", name, check=False)


def wait(builder: Builder, name: str) -> None:
    limit = time.monotonic() + READY_SECONDS
    while True:
        probe = ["curl", "--silent", "--fail", f"http://127.0.0.1:{PORTS['NEMOSERVE_HTTP_PORT']}/v1/health/ready"]
        if subprocess.run(probe, stdout=subprocess.DEVNULL, check=False).returncode == 0:
            return
        running = builder.run("podman", "inspect", name, "--format={{.State.Running}}", quiet=True)
        assert running == "true", "it ended before it was ready"
        assert time.monotonic() < limit, f"it was not ready after {READY_SECONDS} seconds"
        time.sleep(5)


def check_server(builder: Builder, folder: Path) -> None:
    assert {"torch", "grpcio", "tritonclient", "starlette"} <= bill(builder, IMAGE)
    check(builder, folder)


def check_autoscaler(builder: Builder, folder: Path) -> None:
    names = bill(builder, OPERATOR)
    assert {"kubernetes", "grpcio", "nemoserve"} <= names, names
    assert not {"torch", "numba", "numpy", "pip"} & names, names
    (folder / "pushed").mkdir()
    check_size(builder, OPERATOR, folder / "pushed")
    asyncio.run(check_operator(builder, folder))


CHECKS = {"server-cpu": check_server, "autoscaler": check_autoscaler}


def main(targets: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="nemoserve-image-") as name:
        folder = Path(name)
        builder = Builder(folder)
        for target in targets or TARGETS:
            builder.build(os.environ.get("BASE") or builder.bootstrap(target), target)
            CHECKS[target](builder, folder)
        builder.run("buildah", "rmi", "--all", "--force", check=False)
    print("built, ran as a user without rights on a root that cannot be written, answered, and ended with 0")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
