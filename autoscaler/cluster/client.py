"""A namespace of a cluster through the official client: JSON as it is, one request per call, a limit on each.

`kubernetes.aio` brings what is worth not writing anew: kubeconfig with its exec plugins, the token of the service
account, which it reads anew each minute, and TLS. Its models and its `Watch` stay unused: a model loses fields that it
does not know, and `Watch` waits for ever on a connection that died without a word.

Nothing is tried again here, as only the caller knows whether what it wanted still holds; but an answer of 401 makes the
credentials be read anew, once, since a token may have been exchanged before its time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import msgspec
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config

from autoscaler.cluster.face import PODS, ClusterError, Json, Kind, WatchEvent
from autoscaler.cluster.objects import PodList

log = logging.getLogger(__name__)

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
MERGE_PATCH = "application/merge-patch+json"
# The largest object that etcd takes is 1.5 MB of its own encoding; nothing that is longer can be an event.
MAX_EVENT_BYTES = 16 * 2**20
ANY_OBJECT: msgspec.json.Decoder[Json] = msgspec.json.Decoder(Json)
LISTS: Mapping[Kind, msgspec.json.Decoder[Any]] = {PODS: msgspec.json.Decoder(PodList)}
# No answer, or half of one; ConfigException: a token file that is being exchanged
BROKEN = (TimeoutError, OSError, aiohttp.ClientError, ConfigException)


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds that are waited at most.

    A dead path shows in a watch by silence alone, and an API server need not speak before `watch` has passed; so that
    is also how long a change may go unseen. A list in between sees it.
    """

    connect: float = 2.0
    call: float = 5.0  # from the call to the last byte of the answer, reading the credentials anew included
    watch: int = 60  # then the server ends a watch; it counts whole seconds
    watch_grace: float = 10.0  # and if it does not within this, the connection is given up


@asynccontextmanager
async def connect(
    kubeconfig: str | None = None, *, namespace: str | None = None, limits: Limits | None = None
) -> AsyncGenerator[ApiCluster]:
    """The cluster that a kubeconfig's current context names, or, without one, the cluster that this pod runs in.

    Args:
        kubeconfig: path, or several with ":" between, as in KUBECONFIG.
        namespace: None: the one of the context, or of the pod.

    Raises:
        ClusterError: there is no usable configuration; code 0, reason `InvalidConfiguration`.
    """
    configuration = Configuration()
    own = await _sign_in(configuration, kubeconfig)
    try:
        api = ApiClient(configuration)
    except OSError as error:  # of certificates
        raise _unusable(kubeconfig, error) from error
    async with api:
        api.user_agent = "nemoserve-autoscaler"
        yield ApiCluster(api, namespace or own, kubeconfig, limits or Limits())


async def _sign_in(configuration: Configuration, kubeconfig: str | None) -> str:
    """Write address and credentials into `configuration`; returns the namespace that goes with them."""
    load: Any = load_kube_config  # untyped
    try:
        if kubeconfig is None:
            return _pod_sign_in(configuration)
        loader = await load(kubeconfig, client_configuration=configuration, persist_config=False)
        return str(loader.current_context["context"].get("namespace") or "default")
    except Exception as error:  # whatever a broken file makes of its reader
        raise _unusable(kubeconfig, error) from error


def _pod_sign_in(configuration: Configuration) -> str:
    load: Any = load_incluster_config  # untyped
    load(configuration)
    return NAMESPACE_FILE.read_text().strip()


def _unusable(kubeconfig: str | None, error: Exception) -> ClusterError:
    what = "this pod's service account" if kubeconfig is None else kubeconfig
    return ClusterError(0, "InvalidConfiguration", f"cannot use {what}: {error}")


class ApiCluster:
    """`autoscaler.cluster.face.Cluster` of a real API server. Belongs to one event loop.

    A write that ends in code 0 may have been done or not.
    """

    def __init__(self, api: ApiClient, namespace: str, kubeconfig: str | None, limits: Limits) -> None:
        self.namespace = namespace
        self._api = api
        self._kubeconfig = kubeconfig
        self._limits = limits

    async def get(self, kind: Kind, name: str, subresource: str = "") -> Json:
        return await self._call("GET", self._path(kind, name, subresource))

    async def list(self, kind: Kind, label_selector: str = "") -> Json:
        decoder = LISTS.get(kind, ANY_OBJECT)
        return await self._call("GET", self._path(kind), query=_selected(label_selector), decoder=decoder)

    async def create(self, kind: Kind, body: Json) -> Json:
        return await self._call("POST", self._path(kind), body=body)

    async def replace(self, kind: Kind, name: str, body: Json, subresource: str = "") -> Json:
        return await self._call("PUT", self._path(kind, name, subresource), body=body)

    async def patch(self, kind: Kind, name: str, patch: Mapping[str, Any], subresource: str = "") -> Json:
        path = self._path(kind, name, subresource)
        return await self._call("PATCH", path, body=dict(patch), content_type=MERGE_PATCH)

    async def watch(self, kind: Kind, resource_version: str, label_selector: str = "") -> AsyncGenerator[WatchEvent]:
        query = [
            ("watch", "true"),
            ("allowWatchBookmarks", "true"),
            ("resourceVersion", resource_version),
            ("timeoutSeconds", str(self._limits.watch)),
            *_selected(label_selector),
        ]
        path = self._path(kind)
        try:
            async with asyncio.timeout(self._limits.call):
                total = self._limits.watch + self._limits.watch_grace
                response = await self._send("GET", path, query, total=total)
            async with response:
                async for line in _lines(response.content):
                    yield _event(line)
        except BROKEN as error:
            raise _unreachable("watch", path, error) from error

    def _path(self, kind: Kind, name: str = "", subresource: str = "") -> str:
        root = f"/apis/{kind.group}/{kind.version}" if kind.group else f"/api/{kind.version}"
        parts = ["namespaces", self.namespace, kind.plural, name, subresource]
        return "/".join([root, *(quote(part, safe="") for part in parts if part)])

    async def _call(
        self,
        method: str,
        path: str,
        *,
        query: Sequence[tuple[str, str]] = (),
        body: Json | None = None,
        content_type: str = "application/json",
        decoder: msgspec.json.Decoder[Json] = ANY_OBJECT,
    ) -> Json:
        try:
            async with asyncio.timeout(self._limits.call):
                async with await self._send(method, path, query, body=body, content_type=content_type) as response:
                    return _object(response.status, await response.read(), decoder)
        except BROKEN as error:
            raise _unreachable(method, path, error) from error

    async def _send(
        self,
        method: str,
        path: str,
        query: Sequence[tuple[str, str]],
        *,
        body: Json | None = None,
        content_type: str = "application/json",
        total: float | None = None,
    ) -> aiohttp.ClientResponse:
        """An answer that is no refusal; its body is to be read, and closed, by the caller."""
        timeout = aiohttp.ClientTimeout(total=total, sock_connect=self._limits.connect)
        for signed_in_anew in (False, True):
            request = await self._api.param_serialize(
                method,
                path,
                query_params=list(query),
                header_params={"Accept": "application/json", "Content-Type": content_type},
                body=body,
                auth_settings=["BearerToken"],
            )
            answer = await self._api.call_api(*request, _request_timeout=timeout)
            response: aiohttp.ClientResponse = answer.response
            if response.status < 400:
                return response
            async with response:
                error = _refusal(response, await response.read())
            if response.status != 401 or signed_in_anew:
                raise error
            log.info("credentials refused, reading them anew", extra={"reason": str(error)})
            await _sign_in(self._api.configuration, self._kubeconfig)
        raise AssertionError("unreachable")


def _selected(label_selector: str) -> list[tuple[str, str]]:
    return [("labelSelector", label_selector)] if label_selector else []


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The stream's lines. Its own `readline` has a limit that an object may pass."""
    rest = b""
    async for chunk in content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line
        if len(rest) > MAX_EVENT_BYTES:
            raise ClusterError(0, "InvalidResponse", f"an event of more than {MAX_EVENT_BYTES} bytes")


def _event(line: bytes) -> WatchEvent:
    event = _object(200, line)
    subject = event.get("object", {})
    if event.get("type") == "ERROR":
        raise _of_status(subject.get("code", 0), subject)
    return WatchEvent(event.get("type", ""), subject)


def _object(code: int, text: bytes, decoder: msgspec.json.Decoder[Json] = ANY_OBJECT) -> Json:
    try:
        return decoder.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ClusterError(code, "InvalidResponse", f"no JSON as it should be: {error}: {text[:200]!r}") from None


def _refusal(response: aiohttp.ClientResponse, text: bytes) -> ClusterError:
    try:
        status = _object(response.status, text)
    except ClusterError:  # of a proxy in between
        status = {"reason": response.reason, "message": text[:200].decode(errors="replace")}
    after = response.headers.get("Retry-After", "")
    return _of_status(response.status, status, float(after) if after.isdecimal() else None)


def _of_status(code: int, status: Json, retry_after: float | None = None) -> ClusterError:
    if retry_after is None:
        retry_after = (status.get("details") or {}).get("retryAfterSeconds")
    return ClusterError(code, status.get("reason") or "Unknown", status.get("message") or "", retry_after)


def _unreachable(method: str, path: str, error: BaseException) -> ClusterError:
    reason = "Timeout" if isinstance(error, TimeoutError) else "Unreachable"
    return ClusterError(0, reason, f"{method} {path}: {str(error) or type(error).__name__}")
