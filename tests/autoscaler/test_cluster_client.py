"""Our client of an API server: limits, errors, credentials. What servers do is in `contract`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.aio.config import incluster_config

from autoscaler.cluster import client, objects
from autoscaler.cluster.client import ApiCluster, Limits, connect
from autoscaler.cluster.face import LEASES, PODS, ClusterError, Json, WatchEvent
from tests.autoscaler.controller.clock import until
from tests.autoscaler.fake_api import FakeApi, Fault
from tests.autoscaler.fake_api.workloads import Workloads, endpoints
from tests.service.security.certificates import Authority

SHORT = Limits(connect=1.0, call=0.3, watch=1, watch_grace=0.1)


def lease(name: str = "lock", **meta: Any) -> Json:
    return {"metadata": {"name": name} | meta, "spec": {"holderIdentity": "a"}}


@pytest.fixture
async def api() -> AsyncIterator[FakeApi]:
    async with FakeApi() as fake:
        yield fake


@pytest.fixture
async def cluster(api: FakeApi, tmp_path: Path) -> AsyncIterator[ApiCluster]:
    async with connect(str(api.kubeconfig(tmp_path)), limits=SHORT) as connected:
        yield connected


async def collect(watch: AsyncIterator[WatchEvent], seen: list[WatchEvent]) -> None:
    async for event in watch:
        seen.append(event)


async def refusal(cluster: ApiCluster) -> ClusterError:
    with pytest.raises(ClusterError) as refused:
        await cluster.get(LEASES, "lock")
    return refused.value


async def test_a_list_of_pods_has_what_is_read_of_them_and_no_more(api: FakeApi, cluster: ApiCluster) -> None:
    labels = {"app": "nemo"}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "server", "image": "nemoserve"}]}}
    spec = {"replicas": 1, "selector": {"matchLabels": labels}, "template": template}
    async with Workloads(api):
        api.apply({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "nemo"}, "spec": spec})
        await until(lambda: bool(endpoints(api, "app=nemo")))
        [item] = (await cluster.list(PODS, "app=nemo"))["items"]
        whole = await cluster.get(PODS, item["metadata"]["name"])
    assert objects.pod(item) == objects.pod(whole)
    assert item == {
        "metadata": {key: value for key, value in whole["metadata"].items() if key in item["metadata"]},
        "spec": {"nodeName": whole["spec"]["nodeName"]},
        "status": whole["status"],
    }
    assert "ownerReferences" not in item["metadata"]


# -- errors and limits -----------------------------------------------------------------------------------------


async def test_a_throttled_call_says_how_long_to_wait(api: FakeApi, cluster: ApiCluster) -> None:
    api.faults.append(Fault(code=429, retry_after=7))
    error = await refusal(cluster)
    assert (error.code, error.reason, error.retry_after) == (429, "TooManyRequests", 7)


async def test_a_fault_of_the_server_is_told_as_it_is_and_not_tried_again(api: FakeApi, cluster: ApiCluster) -> None:
    api.faults.append(Fault(code=500))
    error = await refusal(cluster)
    assert (error.code, error.reason, error.retry_after) == (500, "InternalError", None)
    assert len(api.calls) == 1


async def test_an_answer_that_is_late_is_not_waited_for(api: FakeApi, cluster: ApiCluster) -> None:
    api.faults.append(Fault(delay=60))
    error = await refusal(cluster)
    assert (error.code, error.reason) == (0, "Timeout")


async def test_a_broken_connection_is_no_answer(api: FakeApi, cluster: ApiCluster) -> None:
    api.faults.append(Fault(verb="create", cut=True))
    with pytest.raises(ClusterError) as refused:
        await cluster.create(LEASES, lease())
    assert (refused.value.code, refused.value.reason) == (0, "Unreachable")
    assert (await refusal(cluster)).not_found


async def test_a_write_whose_answer_is_lost_may_have_been_done(api: FakeApi, cluster: ApiCluster) -> None:
    api.faults.append(Fault(verb="create", cut=True, after=True))
    with pytest.raises(ClusterError) as refused:
        await cluster.create(LEASES, lease())
    assert refused.value.code == 0
    assert (await cluster.get(LEASES, "lock"))["spec"] == {"holderIdentity": "a"}


async def test_a_server_that_comes_back_is_found_again(api: FakeApi, cluster: ApiCluster) -> None:
    await cluster.create(LEASES, lease())
    await api.stop()
    error = await refusal(cluster)
    assert (error.code, error.reason) == (0, "Unreachable")
    await api.start()
    assert (await cluster.get(LEASES, "lock"))["metadata"]["name"] == "lock"


async def test_an_answer_of_a_proxy_in_between_is_no_status(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 502 Bad Gateway\r\nRetry-After: 3\r\nContent-Length: 6\r\nConnection: close\r\n\r\n<html>"
        )
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as proxy:
        fake = FakeApi()
        fake._port = proxy.sockets[0].getsockname()[1]
        async with connect(str(fake.kubeconfig(tmp_path)), limits=SHORT) as cluster:
            error = await refusal(cluster)
    assert (error.code, error.reason, error.retry_after) == (502, "Bad Gateway", 3)


# -- watches ---------------------------------------------------------------------------------------------------


async def test_a_watch_that_falls_silent_is_given_up(api: FakeApi, cluster: ApiCluster) -> None:
    api.faults.append(Fault(verb="watch", silent=True))
    began = time.monotonic()
    with pytest.raises(ClusterError) as refused:
        await collect(cluster.watch(LEASES, "0"), [])
    assert (refused.value.code, refused.value.reason) == (0, "Timeout")
    assert time.monotonic() - began >= SHORT.watch


async def test_a_watch_that_breaks_is_an_error_and_goes_on_from_where_it_was(api: FakeApi, cluster: ApiCluster) -> None:
    seen: list[WatchEvent] = []
    version = (await cluster.list(LEASES))["metadata"]["resourceVersion"]
    for name in "ab":
        await cluster.create(LEASES, lease(name))
    api.faults.append(Fault(verb="watch", cut=True))
    with pytest.raises(ClusterError) as refused:
        await collect(cluster.watch(LEASES, version), seen)
    assert refused.value.code == 0
    await api.restart()
    await collect(cluster.watch(LEASES, seen[-1].object["metadata"]["resourceVersion"]), seen)
    assert [event.object["metadata"]["name"] for event in seen if event.type == "ADDED"] == ["a", "b"]


async def test_an_event_may_be_larger_than_a_buffer(api: FakeApi, cluster: ApiCluster) -> None:
    await cluster.create(LEASES, lease(annotations={"large": "x" * 3_000_000}))
    async with aclosing(cluster.watch(LEASES, "0")) as events:
        first = await anext(events)
    assert len(first.object["metadata"]["annotations"]["large"]) == 3_000_000


async def test_who_leaves_a_watch_closes_it(api: FakeApi, cluster: ApiCluster) -> None:
    await cluster.create(LEASES, lease())
    async with aclosing(cluster.watch(LEASES, "0")) as events:
        await anext(events)
        assert not api.store.unwatched.is_set()
    async with asyncio.timeout(5):
        await api.store.unwatched.wait()


async def test_who_may_not_watch_is_told_at_once(api: FakeApi, tmp_path: Path) -> None:
    user = "system:serviceaccount:default:nobody"
    async with connect(str(api.kubeconfig(tmp_path, user)), limits=SHORT) as cluster:
        with pytest.raises(ClusterError, match="cannot watch resource") as refused:
            await anext(aiter(cluster.watch(PODS, "1")))
    assert refused.value.code == 403


# -- credentials -----------------------------------------------------------------------------------------------


async def test_the_namespace_is_the_context_s_unless_another_is_named(api: FakeApi, tmp_path: Path) -> None:
    path = str(api.kubeconfig(tmp_path, namespace="kube-system"))
    async with connect(path) as cluster:
        assert cluster.namespace == "kube-system"
    async with connect(path, namespace="default") as cluster:
        assert cluster.namespace == "default"


@pytest.mark.parametrize("text", [None, "", "[]", "a: b", ": :"])
async def test_a_file_that_is_no_kubeconfig_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "config"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ClusterError, match=str(path)) as refused:
        async with connect(str(path)):
            pass
    assert (refused.value.code, refused.value.reason) == (0, "InvalidConfiguration")


async def test_outside_of_a_cluster_there_must_be_a_kubeconfig(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ClusterError, match="this pod's service account"):
        async with connect():
            pass


async def test_a_token_that_was_exchanged_is_read_anew(api: FakeApi, tmp_path: Path) -> None:
    path, token = api.kubeconfig(tmp_path), tmp_path / "token"
    config = yaml.safe_load(path.read_text())
    config["users"][0]["user"] = {"tokenFile": str(token)}
    path.write_text(yaml.safe_dump(config))
    token.write_text(api.token())
    async with connect(str(path), limits=SHORT) as cluster:
        await cluster.create(LEASES, lease())
        api.access.tokens.clear()
        error = await refusal(cluster)
        assert (error.code, error.reason) == (401, "Unauthorized")
        token.unlink()
        assert (await refusal(cluster)).reason == "InvalidConfiguration"
        token.write_text(api.token())
        assert await cluster.get(LEASES, "lock")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


async def test_a_pod_signs_in_with_what_is_mounted_into_it(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, namespace = tmp_path / "token", tmp_path / "namespace"
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(authority.path))
    monkeypatch.setattr(client, "NAMESPACE_FILE", namespace)
    namespace.write_text("kube-system\n")
    async with FakeApi(authority=authority) as api:
        host, _, port = api.url.removeprefix("https://").partition(":")
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
        token.write_text(api.token())
        async with connect(limits=SHORT) as cluster:
            assert cluster.namespace == "kube-system"
            await cluster.create(LEASES, lease())
            api.access.tokens.clear()  # as when the signing key was exchanged
            token.write_text(api.token())
            assert (await cluster.get(LEASES, "lock"))["metadata"]["namespace"] == "kube-system"


async def test_a_server_that_another_authority_vouches_for_is_not_spoken_to(
    authority: Authority, tmp_path: Path
) -> None:
    async with FakeApi(authority=authority) as api:
        path = api.kubeconfig(tmp_path)
        config = yaml.safe_load(path.read_text())
        config["clusters"][0]["cluster"]["certificate-authority"] = str(Authority(tmp_path / "other").path)
        path.write_text(yaml.safe_dump(config))
        async with connect(str(path), limits=SHORT) as cluster:
            error = await refusal(cluster)
        assert (error.code, error.reason) == (0, "Unreachable")
        assert "certificate" in str(error)
        assert api.calls == []
