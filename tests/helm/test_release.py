"""A release with the operator from its install to its end, by the real helms, on a fake API server."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from autoscaler.cluster.face import DEPLOYMENTS, QUEUE_AUTOSCALERS, Kind
from helm.chart import CHART, Object
from helm.tools import HELMS, tool
from tests.autoscaler.api_under_test import definition
from tests.helm.helm_api import HelmApi
from tests.helm.test_operator import NAME, OPERATOR
from tests.service.security.certificates import Authority

SERVICES = Kind("", "v1", "services")
DEFINITIONS = Kind("apiextensions.k8s.io", "v1", "customresourcedefinitions")
ON = "autoscaling.enabled=true"


@dataclass
class Helm:
    """One of both, as a user of a fresh machine and cluster has it."""

    program: Path
    api: HelmApi
    home: Path

    async def __call__(self, command: str, *args: str, namespace: str = "one") -> str:
        """What it prints; where it ends with another code than 0, that is what it says."""
        options = ["--namespace", namespace, "--kubeconfig", str(self.api.kubeconfig(self.home))]
        if command in ("install", "upgrade"):
            # the fake knows no server-side apply, which is helm 4's default, and has no descriptions of objects
            options += [str(CHART), "--disable-openapi-validation"]
        if command != "uninstall" and self.program.name == "helm4":
            options += ["--server-side=false"]
        whole = [str(self.program), command, "nemo", *args, *options]
        environ = {"HOME": str(self.home), "PATH": os.environ["PATH"]}
        done = await asyncio.to_thread(
            subprocess.run, whole, capture_output=True, text=True, timeout=120, check=False, env=environ
        )
        return "" if done.returncode == 0 else done.stdout + done.stderr

    def resource(self, namespace: str = "one") -> Object:
        return self.api.get(QUEUE_AUTOSCALERS, NAME, namespace)


@pytest.fixture(params=HELMS)
async def helm(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Helm]:
    async with HelmApi(authority=Authority(tmp_path / "authority")) as api:
        for name in ("one", "two"):
            api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        yield Helm(tool(request.param), api, tmp_path)


async def test_one_command_brings_all_and_others_lose_nothing_by_its_end(helm: Helm) -> None:
    assert not await helm("install", "--set", ON)
    assert not await helm("install", "--set", ON, namespace="two")  # the definition is there, and stays as it is
    first = helm.resource()
    people_pin = {"spec": first["spec"] | {"replicas": 3}}
    helm.api.update(QUEUE_AUTOSCALERS, NAME, lambda old: old | people_pin, namespace="one")
    helm.api.update(DEPLOYMENTS, NAME, lambda old: old | {"spec": old["spec"] | {"replicas": 5}}, namespace="one")
    assert not await helm("upgrade", "--set", f"{ON},autoscaling.maxReplicas=6")
    assert helm.resource()["metadata"]["uid"] == first["metadata"]["uid"]
    assert (helm.resource()["spec"]["maxReplicas"], helm.resource()["spec"]["replicas"]) == (6, 3)
    assert not await helm("rollback", "1")
    assert helm.resource()["spec"]["maxReplicas"] == 4
    assert helm.api.get(DEPLOYMENTS, NAME, "one")["spec"]["replicas"] == 5  # as the operator asked for
    assert not await helm("uninstall")
    assert helm.api.list(QUEUE_AUTOSCALERS, "one") == []
    assert helm.api.list(DEPLOYMENTS, "one") == []
    assert helm.resource("two")
    assert helm.api.list(DEFINITIONS, "")


@pytest.mark.parametrize("helm", HELMS[-1:], indirect=True)
async def test_it_is_turned_on_later_where_all_servers_bear_the_label(helm: Helm) -> None:
    assert not await helm("install")
    assert "kubectl apply --server-side --filename deploy/crds" in await helm("upgrade", "--set", ON)
    helm.api.apply(definition())

    def older(deployment: Object) -> Object:
        """As a version of the chart left it that did not know the label."""
        del deployment["spec"]["template"]["metadata"]["labels"]["nemoserve.dev/serves"]
        return deployment

    def rolled(deployment: Object, updated: int) -> Object:
        return deployment | {"status": {"replicas": 2, "updatedReplicas": updated}}

    helm.api.update(DEPLOYMENTS, NAME, older, namespace="one")
    assert "nemoserve.dev/serves" in await helm("upgrade", "--set", ON)
    assert not await helm("upgrade")
    helm.api.update(DEPLOYMENTS, NAME, lambda old: rolled(old, 1), "status", namespace="one")
    assert "wait for kubectl rollout status" in await helm("upgrade", "--set", ON)
    helm.api.update(DEPLOYMENTS, NAME, lambda old: rolled(old, 2), "status", namespace="one")
    assert "nemoserve.dev/serves" not in helm.api.get(SERVICES, NAME, "one")["spec"]["selector"]
    assert not await helm("upgrade", "--set", ON)
    assert helm.api.get(SERVICES, NAME, "one")["spec"]["selector"] == {"nemoserve.dev/serves": NAME}
    assert helm.api.get(DEPLOYMENTS, OPERATOR, "one")
