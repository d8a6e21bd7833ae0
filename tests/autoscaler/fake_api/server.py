"""The fake's HTTP: paths, verbs, faults, and a log of what was asked by whom.

Order of a request, as in kube-apiserver: who calls (401), fault, may he (403), what he wants.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import uvicorn
import yaml
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from autoscaler.cluster.face import Kind
from tests.autoscaler.fake_api import errors, patches, selectors
from tests.autoscaler.fake_api.access import ADMIN, Access, Request
from tests.autoscaler.fake_api.discovery import discover
from tests.autoscaler.fake_api.errors import ApiError, Json
from tests.autoscaler.fake_api.faults import Fault
from tests.autoscaler.fake_api.machinery import Machinery
from tests.autoscaler.fake_api.resources import Resource
from tests.autoscaler.fake_api.store import Store
from tests.autoscaler.fake_api.table import table
from tests.autoscaler.fake_api.watching import Watch
from tests.service.security.certificates import Authority

PATH = re.compile(
    r"^/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+)/(?P<version>[^/]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+))?/(?P<plural>[^/]+)(?:/(?P<name>[^/]+)(?:/(?P<subresource>[^/]+))?)?$"
)
NAMESPACE = re.compile(r"^/api/v1/namespaces/(?P<name>[^/]+)(?:/(?P<subresource>status|finalize))?$")
VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
CHANGES = ("create", "update", "patch", "delete")
DEFAULT_WATCH_SECONDS = 1800.0


@dataclass(frozen=True, slots=True)
class Call:
    """One that was answered. `code` 0: its connection was cut."""

    request: Request
    body: Any
    code: int

    @property
    def verb(self) -> str:
        return self.request.verb

    @property
    def resource(self) -> str:
        return self.request.resource


@dataclass(slots=True)
class Target:
    resource: Resource
    namespace: str
    name: str
    subresource: str
    verb: str
    query: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return f"{self.resource.plural}/{self.subresource}" if self.subresource else self.resource.plural


class FakeApi:
    """A kube-apiserver on loopback. `async with FakeApi() as api:` runs it.

    Args:
        clock: Unix seconds, for timestamps.
        bookmark_seconds: between two bookmarks of a watch.
        authority: signs the certificate; without one it speaks plain HTTP, which kubectl sends no token over.

    Attributes:
        store: what it has; it outlives `stop` and `start`, as etcd does.
        calls: that were answered.
        faults: of them, the first that matches befalls a request.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.time,
        bookmark_seconds: float = 1.0,
        authority: Authority | None = None,
    ) -> None:
        self.store = Store()
        self.machinery = Machinery(self.store, clock)
        self.access = Access(self.machinery)
        self.calls: list[Call] = []
        self.faults: list[Fault] = []
        self._clock = clock
        self._bookmark_seconds = bookmark_seconds
        self._port = 0
        self._authority = authority
        self._signed = authority.server() if authority is not None else None
        self._bugs: list[Exception] = []
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # -- its life, and who it knows ----------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"{'https' if self._signed else 'http'}://127.0.0.1:{self._port}"

    async def start(self) -> None:
        """On the port that it had, if it ran before."""
        # Named TCP, so that asyncio sends at once what it is given: an answer would take 40 ms else
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self._port))
        self._port = listener.getsockname()[1]
        config = uvicorn.Config(
            self,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=logging.CRITICAL,
            access_log=False,
            ssl_certfile=self._signed and self._signed.certificate,
            ssl_keyfile=self._signed and str(self._signed.key),
        )
        self._server = _Server(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]), name="fake-api")
        await self._server.listening.wait()

    async def stop(self) -> None:
        """At once: connections break, whatever is under way is lost. Raises what the fake itself failed with."""
        server, serving, self._server, self._serving = self._server, self._serving, None, None
        if server is None or serving is None:
            return
        server.leaving.set()
        await serving
        if self._bugs:
            raise self._bugs[0]

    async def restart(self) -> None:
        await self.stop()
        await self.start()

    def token(self, user: str = ADMIN) -> str:
        """A new one for this user: `system:serviceaccount:NAMESPACE:NAME`, or an administrator."""
        token = secrets.token_hex(16)
        self.access.tokens[token] = user
        return token

    def kubeconfig(self, folder: Path, user: str = ADMIN, namespace: str = "default") -> Path:
        """A new file in `folder` that signs in as this user."""
        token = self.token(user)
        context = {"cluster": "fake", "user": "user", "namespace": namespace}
        cluster = {"server": self.url}
        if self._authority is not None:
            cluster["certificate-authority"] = str(self._authority.path)
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "fake", "cluster": cluster}],
            "users": [{"name": "user", "user": {"token": token}}],
            "contexts": [{"name": "fake", "context": context}],
            "current-context": "fake",
        }
        path = folder / f"kubeconfig-{token[:8]}"
        path.write_text(yaml.safe_dump(config))
        return path

    # -- what tests look at, and put there ---------------------------------------------------------------------

    def apply(self, *bodies: Json, namespace: str = "default") -> None:
        """Create objects, as an administrator, without a request. Custom resource definitions too."""
        for body in bodies:
            group, _, version = body["apiVersion"].rpartition("/")
            [resource] = [
                each
                for each in self.machinery.resources
                if (each.group, each.version, each.kind) == (group, version, body["kind"])
            ]
            within = body.get("metadata", {}).get("namespace", namespace) if resource.namespaced else ""
            self.machinery.create(resource, within, body)

    def apply_file(self, path: Path, namespace: str = "default") -> None:
        self.apply(*filter(None, yaml.safe_load_all(path.read_text())), namespace=namespace)

    def get(self, kind: Kind, name: str, namespace: str = "default") -> Json:
        """Raises ApiError 404."""
        return self.store.get(self.machinery.resource(kind.group, kind.plural), namespace, name)

    def list(self, kind: Kind, namespace: str = "default", label_selector: str = "") -> list[Json]:
        found = self.store.list(self.machinery.resource(kind.group, kind.plural), namespace)
        return [*filter(selectors.labels(label_selector), found)]

    async def until(self, so: Callable[[], bool], seconds: float = 10.0) -> None:
        """Wait until what is stored makes it so. Raises TimeoutError."""
        with self.store.changed() as changed:
            async with asyncio.timeout(seconds):
                while not so():
                    changed.clear()
                    await changed.wait()

    def writes(self, user: str = "", resource: str = "") -> list[Call]:
        """Changes that were granted, oldest first."""
        return [
            call
            for call in self.calls
            if call.verb in CHANGES and call.code in (200, 201)
            if user in ("", call.request.user) and resource in ("", call.resource)
        ]

    # -- answering ---------------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        http = HttpRequest(scope, receive)
        try:
            response = await self._respond(http)
        except ConnectionAbortedError:
            self._cut(scope)
        except Exception as error:
            self._bugs.append(error)
            raise
        else:
            await response(scope, receive, send)

    async def _respond(self, http: HttpRequest) -> Response:
        request, body, code = Request("", http.method.lower()), None, 0
        try:
            user = self.access.user(http.headers.get("authorization", ""))
            target = self._target(http)
            if target is None:
                response: Response = JSONResponse(discover(http.url.path, self.machinery.resources))
            else:
                request, body = _request(user, target), _json(await http.body())
                response = await self._befallen(http, request, target, body)
            code = response.status_code
        except ApiError as error:
            code = error.code
            headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
            response = JSONResponse(error.status(), code, headers)
        finally:
            if request.resource:
                self.calls.append(Call(request, body, code))
        return response

    async def _befallen(self, http: HttpRequest, request: Request, target: Target, body: Any) -> Response:
        fault = next((each for each in self.faults if each.befalls(request.verb, http.url.path)), Fault(times=0))
        await asyncio.sleep(fault.delay)
        if fault.code and not fault.after:
            raise _injected(fault)
        if fault.cut and not fault.after and request.verb != "watch":
            raise ConnectionAbortedError
        self.access.check(request)
        if request.verb == "watch":
            return StreamingResponse(self._watch(http, target, fault), media_type="application/json")
        response = self._answer(http, target, body)
        if fault.code:
            raise _injected(fault)
        if fault.cut:
            raise ConnectionAbortedError
        return response

    def _target(self, http: HttpRequest) -> Target | None:
        """None: a path of discovery."""
        path, query = http.url.path, dict(http.query_params)
        found = NAMESPACE.match(path) or PATH.match(path)
        if found is None:
            return None
        parts = {"plural": "namespaces", "core": "v1"} | found.groupdict()
        resource = self.machinery.resource(parts.get("group") or "", parts["plural"], parts["core"] or parts["version"])
        name = parts["name"] or ""
        verb = VERBS.get(http.method) or ("get" if name else "list")
        if verb == "list" and query.get("watch", "") in ("1", "true"):
            verb = "watch"
        if verb not in ("create", "list", "watch") and not name:
            raise ApiError(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
        return Target(resource, parts.get("namespace") or "", name, parts["subresource"] or "", verb, query)

    def _answer(self, http: HttpRequest, target: Target, body: Any) -> Response:
        resource, namespace, name, subresource = target.resource, target.namespace, target.name, target.subresource
        options: dict[str, Any] = {"dry_run": "dryRun" in target.query}
        strict = {"strict": target.query.get("fieldValidation") == "Strict"}
        match target.verb:
            case "get" if subresource == "scale":
                return JSONResponse(self.machinery.scale(resource, namespace, name))
            case "get":
                if subresource == "status" and not resource.status:
                    raise errors.no_such_resource()
                return self._shown(http, resource, self.store.get(resource, namespace, name))
            case "list":
                return self._listed(http, target)
            case "create" if subresource == "token":
                return JSONResponse(self._new_token(target), 201)
            case "create":
                return JSONResponse(self.machinery.create(resource, namespace, body, **options, **strict), 201)
            case "update" if resource.upsert and not subresource and not self.store.find(resource, namespace, name):
                return JSONResponse(self.machinery.create(resource, namespace, body, **options, **strict), 201)
            case "update":
                alter = lambda old: body  # noqa: E731
            case "patch":
                options["is_patch"] = True
                alter = _patching(http.headers.get("content-type", ""), resource, body)
            case _:
                return JSONResponse(self.machinery.delete(resource, namespace, name, body or {}, **options))
        return JSONResponse(self.machinery.update(resource, namespace, name, alter, subresource, **options, **strict))

    def _shown(self, http: HttpRequest, resource: Resource, item: Json) -> Response:
        if "as=Table" in http.headers.get("accept", ""):
            return JSONResponse(table(resource, [item], item["metadata"]["resourceVersion"], self._clock()))
        return JSONResponse(item)

    def _listed(self, http: HttpRequest, target: Target) -> Response:
        resource, query = target.resource, target.query
        asked = _version(query.get("resourceVersion") or "0")
        if asked > self.store.version:
            raise errors.too_large(asked, self.store.version)
        if query.get("resourceVersionMatch") == "Exact" and asked != self.store.version:
            raise errors.expired(asked, self.store.version)  # no other state is kept
        match = selectors.by(query.get("labelSelector", ""), query.get("fieldSelector", ""), resource.fields)
        items = [*filter(match, self.store.list(resource, target.namespace))]
        version = str(self.store.version)
        if "as=Table" in http.headers.get("accept", ""):
            return JSONResponse(table(resource, items, version, self._clock()))
        if not resource.custom:  # Go leaves out the type of what a typed list holds
            items = [{key: item[key] for key in item if key not in ("kind", "apiVersion")} for item in items]
        head = {"kind": f"{resource.kind}List", "apiVersion": resource.api_version}
        return JSONResponse(head | {"metadata": {"resourceVersion": version}, "items": items})

    async def _watch(self, http: HttpRequest, target: Target, fault: Fault) -> AsyncIterator[bytes]:
        query = target.query
        watch = Watch(
            resource=target.resource,
            namespace=target.namespace,
            match=selectors.by(query.get("labelSelector", ""), query.get("fieldSelector", ""), target.resource.fields),
            version=query.get("resourceVersion", ""),
            seconds=float(query.get("timeoutSeconds") or DEFAULT_WATCH_SECONDS),
            bookmark_seconds=self._bookmark_seconds if query.get("allowWatchBookmarks") == "true" else None,
        )
        if fault.silent:
            await asyncio.Event().wait()
        async for line in watch.lines(self.store):
            yield line
            if fault.cut:
                self._cut(http.scope)
                return

    def _new_token(self, target: Target) -> Json:
        self.store.get(target.resource, target.namespace, target.name)
        status = {"token": self.token(f"system:serviceaccount:{target.namespace}:{target.name}")}
        status["expirationTimestamp"] = self.machinery.now(3600)
        return {"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "status": status}

    def _cut(self, scope: Scope) -> None:
        assert self._server is not None
        for connection in list(self._server.server_state.connections):
            if getattr(connection, "scope", None) is scope:
                connection.transport.abort()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()
        self.leaving = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    async def main_loop(self) -> None:
        await self.leaving.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in [*self.servers, *(sockets or ())]:
            listener.close()
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        tasks = list(self.server_state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the tests."""
        yield


def _json(text: bytes) -> Any:
    try:
        return json.loads(text) if text else None
    except ValueError as error:
        raise errors.bad_request(f"the body is no JSON: {error}") from None


def _version(text: str) -> int:
    if not text.isdecimal():
        raise errors.bad_request(f'resourceVersion: Invalid value: "{text}": no number')
    return int(text)


def _request(user: str, target: Target) -> Request:
    """Who lists or watches one name is taken to have named it, as in kube-apiserver."""
    name = target.name
    if target.verb in ("list", "watch"):
        found = re.search(r"metadata\.name=+([^,]+)", target.query.get("fieldSelector", ""))
        name = found[1] if found else ""
    return Request(user, target.verb, target.resource.group, target.path, target.namespace, name)


def _patching(content_type: str, resource: Resource, patch: Any) -> Callable[[Json], Json]:
    known = (patches.MERGE, patches.JSON) if resource.custom else (patches.MERGE, patches.JSON, patches.STRATEGIC)
    if content_type not in known:
        accepted = ", ".join(known)
        what = "the body of the request was in an unknown format - accepted media types include: "
        raise ApiError(415, "UnsupportedMediaType", what + accepted)
    return lambda old: patches.apply(content_type, old, patch)


def _injected(fault: Fault) -> ApiError:
    reason = {429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable", 504: "Timeout"}.get(
        fault.code, ""
    )
    return ApiError(fault.code, reason, "injected by a test", retry_after=fault.retry_after)
