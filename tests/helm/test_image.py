"""The Dockerfile: what can be said of it without building it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from helm.chart import of_kind
from service.cli.main import main
from service.version import VERSION
from tests.helm.conftest import SETS, pod_specs, rendered, server
from tests.helm.test_hardening import is_operator
from tests.test_house import imports, modules, within

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text()


def test_hadolint_finds_nothing() -> None:
    lint = [str(Path(sys.executable).parent / "hadolint"), "--config", ".hadolint.yaml", "Dockerfile"]
    done = subprocess.run(lint, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_targets_are_those_of_the_make_targets() -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", TEXT, re.MULTILINE))
    assert set(re.findall(r"--target (\S+)", (ROOT / "Makefile").read_text())) <= targets
    assert {"server", "server-cpu", "autoscaler"} <= targets


def test_the_process_is_the_server_or_the_operator_itself_and_hears_sigterm() -> None:
    assert re.findall(r"^ENTRYPOINT (.*)$", TEXT, re.MULTILINE) == ['["nemoserve"]', '["nemoserve-autoscaler"]']
    assert re.findall(r"^STOPSIGNAL (.*)$", TEXT, re.MULTILINE) == ["SIGTERM"] * 2
    assert re.findall(r"^USER (.*)$", TEXT, re.MULTILINE) == ["1000:0"] * 2


def test_the_version_is_the_packages() -> None:
    assert set(re.findall(r"ARG VERSION=(.*)", TEXT)) == {VERSION}


@pytest.mark.parametrize("name", SETS)
def test_containers_run_commands_that_there_are(name: str) -> None:
    for spec in pod_specs(rendered(name)):
        for container in spec["containers"]:
            assert "command" not in container
            if not is_operator(spec):
                assert container["args"][0] in main.commands


@pytest.mark.parametrize("name", SETS)
def test_what_the_image_writes_to_is_a_volume(name: str) -> None:
    mounted = {mount["mountPath"] for mount in server(rendered(name))["volumeMounts"] if not mount.get("readOnly")}
    assert {"/home/nemoserve", "/tmp", "/model-store", "/dev/shm"} <= mounted
    assert re.findall(r"HOME=(\S+)", TEXT) == ["/home/nemoserve"]


def test_what_is_copied_is_let_through() -> None:
    copied = [name for line in re.findall(r"^COPY (?!--from)(.*) \S+$", TEXT, re.MULTILINE) for name in line.split()]
    let_through = (ROOT / ".dockerignore").read_text().splitlines()
    assert copied
    assert all(f"!{name}" in let_through for name in copied)
    assert all((ROOT / name).exists() for name in copied)


def test_jobs_and_servers_run_one_image() -> None:
    found = rendered("h100")
    images = {spec["containers"][0]["image"] for spec in pod_specs(found)}
    assert len(images) == 1
    assert of_kind(found, "Job")


def test_the_operator_imports_what_its_image_has() -> None:
    """And nothing that a package of others happened to bring."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["autoscaler"]]
    declared = {re.split(r"[<>=\[; ]", each)[0] for each in asked}
    rooms = {
        name: path for name, path in modules("autoscaler", "process").items() if not within(name, "autoscaler.simulate")
    }
    known = {*sys.stdlib_module_names, "autoscaler", "process", "nemoserve"}
    imported = {name.partition(".")[0] for path in rooms.values() for name in imports(path)} - known
    packages = packages_distributions()
    assert {"grpc", "kubernetes"} <= imported
    assert [
        name for name in sorted(imported) if not declared & {each.lower().replace("_", "-") for each in packages[name]}
    ] == []
