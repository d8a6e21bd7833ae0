"""The operator as the chart starts it, with the rights that the chart gives it: they are enough."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx

from autoscaler.cluster.face import DEPLOYMENTS, EVENTS, LEASES, PODS, QUEUE_AUTOSCALERS
from helm.chart import Object, objects, render
from helm.tools import HELMS
from tests.autoscaler.api_under_test import definition
from tests.autoscaler.controller.test_process import operator
from tests.autoscaler.fake_api import FakeApi
from tests.autoscaler.observe.replicas import free_port
from tests.helm.test_operator import NAME, OPERATOR, container
from tests.helm.test_operator import operator as deployment

ZERO = "autoscaling.enabled=true,autoscaling.minReplicas=0,autoscaling.scaleToZero.enabled=true"
ACCOUNT = f"system:serviceaccount:serving:{OPERATOR}"
APPLIED = ("ServiceAccount", "Role", "RoleBinding", "Deployment", "Service", "QueueAutoscaler")


def pod(found: list[Object]) -> Object:
    """Of the operator's Deployment, the one that is started here."""
    template = deployment(found)["spec"]["template"]
    metadata = {"name": f"{OPERATOR}-0", "labels": template["metadata"]["labels"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def bring(api: FakeApi, found: list[Object], replicas: int) -> None:
    """What the chart renders, as far as the fake knows the kinds, with a number of servers that somebody asked for."""
    api.apply(definition(), {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "serving"}})
    for each in found:
        if each["kind"] in APPLIED:
            api.apply(each, namespace="serving")
    wanted = {"spec": {**api.get(DEPLOYMENTS, NAME, "serving")["spec"], "replicas": replicas}}
    api.update(DEPLOYMENTS, NAME, lambda old: old | wanted, namespace="serving")
    api.apply(pod(found), namespace="serving")


async def test_a_request_starts_the_first_server_and_nothing_is_forbidden(tmp_path: Path) -> None:
    found = objects(render(HELMS[-1], None, "--set", ZERO))
    async with FakeApi() as api:
        bring(api, found, replicas=0)
        http, rpc = free_port(), free_port()
        here = [
            f"--kubeconfig={api.kubeconfig(tmp_path, ACCOUNT, 'serving')}",
            *("--pod-name", f"{OPERATOR}-0", "--namespace=serving", "--metrics-host=127.0.0.1", "--metrics-port=0"),
            *("--activator-host=127.0.0.1", f"--activator-http-port={http}", f"--activator-grpc-port={rpc}"),
        ]
        async with operator(*container(found)["args"], *here) as running, httpx.AsyncClient(timeout=60) as client:
            await running.port()
            service = api.list(QUEUE_AUTOSCALERS, "serving")[0]["spec"]["scaleTargetRef"]["name"]
            selected = f"nemoserve.dev/serves={service}"
            await api.until(lambda: bool(api.list(PODS, "serving", selected)), 60)
            assert [each["metadata"]["name"] for each in api.list(PODS, "serving", selected)] == [f"{OPERATOR}-0"]
            waiting = asyncio.create_task(client.post(f"http://127.0.0.1:{http}/v1/completions", json={"model": "x"}))
            await api.until(lambda: api.get(DEPLOYMENTS, NAME, "serving")["spec"]["replicas"] == 1, 60)
            await api.until(lambda: "decisions" in api.get(QUEUE_AUTOSCALERS, NAME, "serving").get("status", {}), 60)
            await api.until(lambda: bool(api.list(EVENTS, "serving")), 60)
            waiting.cancel()
            assert api.get(LEASES, OPERATOR, "serving")["spec"]["holderIdentity"]
            running.process.terminate()
            assert await running.end() == 0, running.log
        assert [call for call in api.calls if call.code in (401, 403)] == []
