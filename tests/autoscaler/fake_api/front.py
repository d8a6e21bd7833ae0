"""The fake's HTTP: who calls, what is meant by path, verb and body, and a log of it all.

Order of a request, as in kube-apiserver: who calls (401), fault, may he (403), what he wants.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tests.autoscaler.fake_api import errors, patches, selectors
from tests.autoscaler.fake_api.access import Access, Request, account
from tests.autoscaler.fake_api.discovery import discover
from tests.autoscaler.fake_api.errors import ApiError, Json
from tests.autoscaler.fake_api.faults import Fault
from tests.autoscaler.fake_api.machinery import Machinery
from tests.autoscaler.fake_api.resources import Resource
from tests.autoscaler.fake_api.table import table
from tests.autoscaler.fake_api.watching import Watch

PATH = re.compile(
    r"^/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+)/(?P<version>[^/]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+))?/(?P<plural>[^/]+)(?:/(?P<name>[^/]+)(?:/(?P<subresource>[^/]+))?)?$"
)
NAMESPACE = re.compile(r"^/api/v1/namespaces/(?P<name>[^/]+)(?:/(?P<subresource>status|finalize))?$")
VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
DEFAULT_WATCH_SECONDS = 1800


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


class Front:
    """An ASGI application.

    Args:
        cut: breaks the connection of a request.

    Attributes:
        calls: that were answered.
        faults: of them, the first that matches befalls a request.
        bugs: what the fake itself failed with.
    """

    def __init__(
        self,
        machinery: Machinery,
        access: Access,
        *,
        clock: Callable[[], float],
        bookmark_seconds: float,
        cut: Callable[[Scope], None],
    ) -> None:
        self.calls: list[Call] = []
        self.faults: list[Fault] = []
        self.bugs: list[Exception] = []
        self._machinery = machinery
        self._store = machinery.store
        self._access = access
        self._clock = clock
        self._bookmark_seconds = bookmark_seconds
        self._cut = cut

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        http = HttpRequest(scope, receive)
        try:
            response = await self._respond(http)
        except (ConnectionAbortedError, ClientDisconnect):
            self._cut(scope)
        except Exception as error:
            self.bugs.append(error)
            raise
        else:
            await response(scope, receive, send)

    async def _respond(self, http: HttpRequest) -> Response:
        request, body, code = Request("", http.method.lower()), None, 0
        try:
            user = self._access.user(http.headers.get("authorization", ""))
            target = self._target(http)
            if target is None:
                response: Response = JSONResponse(discover(http.url.path, self._machinery.resources))
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
        self._access.check(request)
        if request.verb == "watch":
            lines = self._lines(self._watch(target), http.scope, fault)
            return StreamingResponse(lines, media_type="application/json")
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
        resource = self._machinery.resource(
            parts.get("group") or "", parts["plural"], parts["core"] or parts["version"]
        )
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
                return JSONResponse(self._machinery.scale(resource, namespace, name))
            case "get":
                if subresource == "status" and not resource.status:
                    raise errors.no_such_resource()
                return self._shown(http, resource, self._store.get(resource, namespace, name))
            case "list":
                return self._listed(http, target)
            case "create" if subresource == "token":
                return JSONResponse(self._new_token(target), 201)
            case "create":
                return JSONResponse(self._machinery.create(resource, namespace, body, **options, **strict), 201)
            case "update" if resource.upsert and not subresource and not self._store.find(resource, namespace, name):
                return JSONResponse(self._machinery.create(resource, namespace, body, **options, **strict), 201)
            case "update":
                alter = lambda old: body  # noqa: E731
            case "patch":
                options["is_patch"] = True
                alter = _patching(http.headers.get("content-type", ""), resource, body)
            case _:
                return JSONResponse(self._machinery.delete(resource, namespace, name, body or {}, **options))
        return JSONResponse(self._machinery.update(resource, namespace, name, alter, subresource, **options, **strict))

    def _shown(self, http: HttpRequest, resource: Resource, item: Json) -> Response:
        if "as=Table" in http.headers.get("accept", ""):
            return JSONResponse(table(resource, [item], item["metadata"]["resourceVersion"], self._clock()))
        return JSONResponse(item)

    def _listed(self, http: HttpRequest, target: Target) -> Response:
        resource, query = target.resource, target.query
        asked = _number(query, "resourceVersion", 0)
        if asked > self._store.version:
            raise errors.too_large(asked, self._store.version)
        if query.get("resourceVersionMatch") == "Exact" and asked != self._store.version:
            raise errors.expired(asked, self._store.version)  # no other state is kept
        match = selectors.by(query.get("labelSelector", ""), query.get("fieldSelector", ""), resource.fields)
        items = [*filter(match, self._store.list(resource, target.namespace))]
        version = str(self._store.version)
        if "as=Table" in http.headers.get("accept", ""):
            return JSONResponse(table(resource, items, version, self._clock()))
        if not resource.custom:  # Go leaves out the type of what a typed list holds
            items = [{key: item[key] for key in item if key not in ("kind", "apiVersion")} for item in items]
        head = {"kind": f"{resource.kind}List", "apiVersion": resource.api_version}
        return JSONResponse(head | {"metadata": {"resourceVersion": version}, "items": items})

    def _watch(self, target: Target) -> Watch:
        query = target.query
        if "sendInitialEvents" in query:
            what = "Forbidden: sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled"
            raise errors.invalid("ListOptions.meta.k8s.io", "", [("sendInitialEvents", what)])
        return Watch(
            resource=target.resource,
            namespace=target.namespace,
            match=selectors.by(query.get("labelSelector", ""), query.get("fieldSelector", ""), target.resource.fields),
            version=_number(query, "resourceVersion", 0),
            seconds=_number(query, "timeoutSeconds", DEFAULT_WATCH_SECONDS),
            bookmark_seconds=self._bookmark_seconds if query.get("allowWatchBookmarks") == "true" else None,
        )

    async def _lines(self, watch: Watch, scope: Scope, fault: Fault) -> AsyncIterator[bytes]:
        if fault.silent:
            await asyncio.Event().wait()
        async for line in watch.lines(self._store):
            yield line
            if fault.cut:
                self._cut(scope)
                return

    def _new_token(self, target: Target) -> Json:
        self._store.get(target.resource, target.namespace, target.name)
        status = {"token": self._access.token(account(target.namespace, target.name))}
        status["expirationTimestamp"] = self._machinery.now(3600)
        return {"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "status": status}


def _json(text: bytes) -> Any:
    try:
        return json.loads(text) if text else None
    except ValueError as error:
        raise errors.bad_request(f"the body is no JSON: {error}") from None


def _number(query: Mapping[str, str], name: str, default: int) -> int:
    text = query.get(name) or str(default)
    if not text.isdecimal():
        raise errors.bad_request(f'{name}: Invalid value: "{text}": no number')
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
