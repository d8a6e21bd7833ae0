"""The real kubectl on the fake: what people type, and that the fake's discovery and tables hold for another client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from autoscaler.cluster.face import DEPLOYMENTS, QUEUE_AUTOSCALERS
from helm import tools
from tests.autoscaler.api_under_test import definition
from tests.autoscaler.bodies import scaler, workload
from tests.autoscaler.fake_api import FakeApi
from tests.service.security.certificates import Authority

pytestmark = pytest.mark.skipif(not tools.runs_here(), reason="kubectl is fetched for Linux on x86-64 alone")


@dataclass
class Kubectl:
    kubeconfig: Path
    cache: Path

    async def __call__(self, *args: str) -> str:
        options = (f"--kubeconfig={self.kubeconfig}", f"--cache-dir={self.cache}")
        done = await asyncio.to_thread(tools.run, "kubectl", *args, *options)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[FakeApi]:
    async with FakeApi(authority=Authority(tmp_path / "authority")) as fake:
        fake.apply(definition(), workload(), scaler())
        yield fake


@pytest.fixture
def kubectl(api: FakeApi, tmp_path: Path) -> Kubectl:
    return Kubectl(api.kubeconfig(tmp_path), tmp_path / "cache")


async def test_the_columns_tell_the_story(api: FakeApi, kubectl: Kubectl) -> None:
    status = {"desired": 3, "ready": 2, "reason": "4200 tokens wait"}
    api.update(QUEUE_AUTOSCALERS, "nemo", lambda old: old | {"status": status}, "status")
    head, row = (await kubectl("get", "qas")).splitlines()
    assert head.split() == ["NAME", "REFERENCE", "MIN", "MAX", "DESIRED", "READY", "REASON", "AGE"]
    assert row.split()[:-1] == ["nemo", "nemo", "1", "4", "3", "2", "4200", "tokens", "wait"]


async def test_people_scale_and_let_go_again(api: FakeApi, kubectl: Kubectl) -> None:
    await kubectl("scale", "qas", "nemo", "--replicas=3")
    assert api.get(QUEUE_AUTOSCALERS, "nemo")["spec"]["replicas"] == 3
    await kubectl("patch", "qas", "nemo", "--type=merge", '--patch={"spec":{"replicas":null}}')
    assert "replicas" not in api.get(QUEUE_AUTOSCALERS, "nemo")["spec"]
    await kubectl("scale", "deployment", "nemo", "--replicas=1", "--current-replicas=2")
    assert api.get(DEPLOYMENTS, "nemo")["spec"]["replicas"] == 1
    names = await kubectl("get", "all", "--output=name")
    assert set(names.split()) == {"deployment.apps/nemo", "queueautoscaler.autoscaling.nemoserve.dev/nemo"}
    await kubectl("delete", "qas", "nemo")
    assert api.list(QUEUE_AUTOSCALERS) == []
