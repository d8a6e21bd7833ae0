"""The API server that the contract suite asks: our fake or the one of $KUBECONFIG, in either a namespace of its own."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import load_kube_config

from autoscaler.cluster.client import ApiCluster, Limits, connect
from autoscaler.cluster.face import QUEUE_AUTOSCALERS, ClusterError, Json, Kind
from helm.chart import DEFINITION
from tests.autoscaler.fake_api import FakeApi

NAMESPACES = Kind("", "v1", "namespaces")
ACCOUNTS = Kind("", "v1", "serviceaccounts")
CRDS = Kind("apiextensions.k8s.io", "v1", "customresourcedefinitions")
MERGE = "application/merge-patch+json"


@functools.cache
def definition() -> Json:
    """Our CRD; not to be changed."""
    found: Json = yaml.safe_load(DEFINITION.read_text())
    return found


@dataclass(frozen=True, slots=True)
class Answer:
    code: int
    body: Json
    headers: Any

    @property
    def reason(self) -> str:
        return str(self.body.get("reason", ""))


@dataclass
class Api:
    """Attributes:
    cluster: our client, in `namespace`.
    fake: None: it is a real one.
    """

    kubeconfig: Path
    namespace: str
    cluster: ApiCluster
    client: ApiClient
    fake: FakeApi | None

    def path(self, kind: Kind, name: str = "", subresource: str = "", namespace: str | None = None) -> str:
        root = f"/apis/{kind.group}/{kind.version}" if kind.group else f"/api/{kind.version}"
        within = self.namespace if namespace is None else namespace
        parts = [root, "namespaces" if within else "", within, kind.plural, name, subresource]
        return "/".join(part for part in parts if part)

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        content_type: str = "application/json",
        accept: str = "application/json",
        token: str = "",
    ) -> Answer:
        """One request as it is, and whatever comes back."""
        auth = {} if token else {"auth_settings": ["BearerToken"]}
        headers = {"Accept": accept, "Content-Type": content_type}
        if token:
            headers["authorization"] = f"Bearer {token}"
        request = await self.client.param_serialize(method, path, header_params=headers, body=body, **auth)
        answer: Any = await self.client.call_api(*request, _request_timeout=20)
        return Answer(answer.status, json.loads(await answer.read()), answer.headers)

    async def patch(self, path: str, patch: Any, kind: str = "merge-patch") -> Answer:
        return await self.call("PATCH", path, patch, content_type=f"application/{kind}+json")

    def kubeconfig_of(self, token: str, folder: Path) -> Path:
        """A file that signs in with this token."""
        config = yaml.safe_load(self.kubeconfig.read_text())
        context = next(each for each in config["contexts"] if each["name"] == config["current-context"])["context"]
        context["user"], context["namespace"] = "other", self.namespace
        config["users"] = [{"name": "other", "user": {"token": token}}]
        path = folder / f"kubeconfig-{uuid.uuid4().hex[:8]}"
        path.write_text(yaml.safe_dump(config))
        return path


@asynccontextmanager
async def fake(folder: Path) -> AsyncIterator[Api]:
    async with FakeApi(bookmark_seconds=0.05) as api, _signed_in(api.kubeconfig(folder), api) as ready:
        yield ready


@asynccontextmanager
async def real() -> AsyncIterator[Api]:
    async with _signed_in(Path(os.environ["KUBECONFIG"]), None) as ready:
        yield ready


@asynccontextmanager
async def _signed_in(kubeconfig: Path, fake: FakeApi | None) -> AsyncIterator[Api]:
    namespace = f"nemoserve-{uuid.uuid4().hex[:8]}"
    configuration = Configuration()
    load: Any = load_kube_config  # untyped
    await load(str(kubeconfig), client_configuration=configuration, persist_config=False)
    limits = Limits(call=20.0, watch=1 if fake else 5)
    async with (
        ApiClient(configuration) as client,
        connect(str(kubeconfig), namespace=namespace, limits=limits) as cluster,
    ):
        api = Api(kubeconfig, namespace, cluster, client, fake)
        crd = api.path(CRDS, namespace="")
        defined = await api.call("POST", crd, definition())
        assert defined.code in (201, 409), defined
        await _until_served(cluster)
        await api.call("POST", api.path(NAMESPACES, namespace=""), {"metadata": {"name": namespace}})
        # Pods need it, and a cluster without its controllers has none
        await api.call("POST", api.path(ACCOUNTS), {"metadata": {"name": "default"}})
        try:
            yield api
        finally:
            await api.call("DELETE", api.path(NAMESPACES, namespace, namespace=""))
            if defined.code == 201:
                await api.call("DELETE", f"{crd}/{definition()['metadata']['name']}")


async def _until_served(cluster: ApiCluster) -> None:
    async with asyncio.timeout(30):
        while True:
            with suppress(ClusterError):
                await cluster.list(QUEUE_AUTOSCALERS)
                return
            await asyncio.sleep(0.1)
