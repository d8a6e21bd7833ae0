"""The HTTP port's door, as a piece of its own: whichever route the router takes, its level decides."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, Router
from starlette.types import Message, Receive, Scope, Send

from service.caller import CALLER, Caller
from service.errors import Code, ServiceError
from service.http.auth import CERTIFICATE, Authenticate
from service.security.access import Access
from service.security.keys import KeysFile

KEY, ADMIN = "nms-0123456789abcdef", "nms-fedcba9876543210"


class Answer:
    """An endpoint that remembers who called."""

    def __init__(self) -> None:
        self.callers: list[Caller] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.callers.append(CALLER.get())
        await PlainTextResponse("reached")(scope, receive, send)


def route(path: str, method: str = "GET") -> Route:
    return Route(path, Answer(), methods=[method])


ROUTES = [
    route("/v1/health/live"),
    route("/v1/models"),
    route("/v1/models/{model:path}"),
    route("/v1/completions", "POST"),
    route("/v1/forgotten"),
    Mount("/more", routes=[route("/v1/health/live")]),
]


@pytest.fixture
def access(tmp_path: Path) -> Access:
    file = tmp_path / "keys.yaml"
    file.write_text(f"- {{name: ann, key: {KEY}}}\n- {{name: ops, key: {ADMIN}, admin: true}}\n")
    return Access(keys=KeysFile(file))


async def call(
    access: Access,
    method: str,
    path: str,
    headers: Mapping[str, str] | None = None,
    state: dict[str, Any] | None = None,
) -> int | Code:
    """The status, or why there is none."""
    app = Authenticate(Router(ROUTES, redirect_slashes=False), access, ROUTES)
    raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw, "query_string": b"", "state": state or {}}
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    try:
        await asyncio.create_task(app(scope, receive, send))  # type: ignore[arg-type]
    except ServiceError as error:
        return error.code
    status: int = sent[0]["status"]
    return status


@pytest.mark.parametrize("path", ["/v1/health/live"])
async def test_health_is_open(access: Access, path: str) -> None:
    assert await call(access, "GET", path) == await call(access, "HEAD", path) == 200


@pytest.mark.parametrize("host", ["localhost", "localhost/v1/health/live?", "x/v1/health/live#", ""])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("HEAD", "/v1/models"),
        ("GET", "/v1/models/a/b"),
        ("POST", "/v1/completions"),
        ("OPTIONS", "/v1/completions"),
        ("GET", "/v1/forgotten"),
        ("GET", "/more/v1/health/live"),
        ("GET", "/nothing"),
        ("POST", "/v1/health/live"),
        ("GET", "/v1/health/live/"),
        ("GET", "//v1/health/live"),
        ("GET", "/v1//health/live"),
        ("GET", "/V1/HEALTH/LIVE"),
        ("GET", "/v1/health/live/../../models"),
        ("GET", "/v1/health/live?"),
        ("GET", "/v1/health/live;x"),
        ("GET", "v1/health/live"),
        ("GET", ""),
        ("GET", "/v1/models\n"),
    ],
)
async def test_everything_else_needs_a_key(access: Access, method: str, path: str, host: str) -> None:
    for headers in ({}, {"x-api-key": "wrong"}, {"authorization": f"Basic {KEY}"}, {"x-tenant": "ann"}):
        assert await call(access, method, path, {"host": host, **headers}) is Code.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models", 200),
        ("GET", "/v1/models/a/b", 200),
        ("POST", "/v1/completions", 200),
        ("GET", "/v1/completions", 405),
        ("GET", "/nothing", 404),
        ("GET", "/v1/forgotten", Code.PERMISSION_DENIED),
        ("GET", "/more/v1/health/live", Code.PERMISSION_DENIED),
    ],
)
async def test_a_route_that_stands_in_no_table_is_for_admins(
    access: Access, method: str, path: str, status: int | Code
) -> None:
    assert await call(access, method, path, {"Authorization": f"bearer {KEY}"}) == status
    if isinstance(status, Code):
        assert await call(access, method, path, {"X-API-Key": ADMIN}) == 200


async def test_who_calls_stands_in_the_task_of_the_request_alone(access: Access) -> None:
    [models] = (each.endpoint for each in ROUTES if isinstance(each, Route) and each.path == "/v1/models")
    models.callers.clear()
    for key in (KEY, ADMIN):
        assert await call(access, "GET", "/v1/models", {"x-api-key": key}) == 200
    assert models.callers == [Caller(tenant="ann", admin=False), Caller(tenant="ops", admin=True)]
    assert CALLER.get() == Caller()


async def test_the_name_in_a_client_certificate_is_taken_from_the_connection() -> None:
    access = Access(client_certificates=True)
    assert await call(access, "GET", "/v1/models", state={CERTIFICATE: "search"}) == 200
    assert await call(access, "GET", "/v1/models", {CERTIFICATE: "search"}) is Code.UNAUTHENTICATED
    assert await call(access, "GET", "/v1/forgotten", state={CERTIFICATE: "search"}) is Code.PERMISSION_DENIED


async def test_pages_of_other_sites_are_not_served_without_keys() -> None:
    assert await call(Access(), "POST", "/v1/completions", {"origin": "http://evil.example"}) is Code.PERMISSION_DENIED
    assert await call(Access(), "POST", "/v1/completions", {"origin": "http://127.0.0.1:8000"}) == 200
