"""What telemetry is told of HTTP requests, and what scrapers get: the real ASGI applications, without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from engine import EngineStats
from service.http.app import create_app
from service.http.observe import Observe, metrics_routes
from service.security.access import Access
from service.security.keys import KeysFile
from service.telemetry import orca
from service.telemetry.calls import CALL
from service.telemetry.export import Export
from service.telemetry.metrics import OTHER
from service.telemetry.telemetry import Telemetry
from tests.service.fakes import FakeHost
from tests.service.telemetry.reports import Scrape

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass
class Web:
    host: FakeHost
    telemetry: Telemetry
    exporter: InMemorySpanExporter
    app: ASGIApp

    async def ask(self, path: str, method: str = "GET", headers: Mapping[str, str] | None = None) -> Answer:
        answer = Answer()
        raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        scope: dict[str, Any] = {
            "type": "http",
            "method": method,
            "path": path,
            "scheme": "http",
            "headers": raw,
            "query_string": b"",
            "client": ("10.1.2.3", 4567),
        }

        requests = iter([{"type": "http.request", "body": b"", "more_body": False}])

        async def receive() -> dict[str, Any]:
            return next(requests, None) or await asyncio.Future()  # nobody goes away

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                answer.body += message["body"]

        await self.app(scope, receive, send)
        return answer

    def calls(self) -> dict[tuple[str, str], float]:
        """By method and code."""
        found = Scrape(self.telemetry).values("nemoserve_calls_total")
        return {(dict(labels)["method"], dict(labels)["code"]): value for labels, value in found.items()}


@pytest.fixture
async def web() -> Web:
    async def item(request: Request) -> Response:
        call = CALL.get()
        return Response("" if call is None else call.method, status_code=int(request.path_params["status"]))

    async def broken(request: Request) -> Response:
        async def pieces() -> Any:
            yield b"piece"
            raise ConnectionError

        return StreamingResponse(pieces())

    host, exporter = FakeHost(), InMemorySpanExporter()
    telemetry = Telemetry(host, tracing=Export(SimpleSpanProcessor(exporter)).tracing)
    routes = [*metrics_routes(telemetry), Route("/v1/items/{status}", item), Route("/v1/broken", broken)]
    return Web(host, telemetry, exporter, Observe(Router(routes), telemetry))


async def test_scrapers_get_metrics_under_both_names_in_the_format_that_they_ask_for(web: Web) -> None:
    for path in ("/metrics", "/v1/metrics"):
        answer = await web.ask(path)
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4; charset=utf-8")
        assert b"nemoserve_requests_running" in answer.body
    answer = await web.ask("/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert answer.body.endswith(b"# EOF\n")


async def test_who_is_refused_at_the_door_has_asked_for_a_route_all_the_same(tmp_path: Path) -> None:
    file, host = tmp_path / "keys.yaml", FakeHost()
    file.write_text("- {name: ann, key: nms-0123456789abcdef}\n")
    telemetry = Telemetry(host)
    app = create_app(host, access=Access(keys=KeysFile(file)), telemetry=telemetry)
    web = Web(host, telemetry, InMemorySpanExporter(), app)
    for path in ("/v1/models", "/made-up-1", "/made-up-2"):
        assert (await web.ask(path)).status == 401
    assert web.calls() == {("GET /v1/models", "401"): 1, (OTHER, "401"): 2}


async def test_calls_are_counted_by_route_not_by_path(web: Web) -> None:
    assert (await web.ask("/v1/items/200")).body == b"GET /v1/items/{status}"
    await web.ask("/v1/items/429")
    with pytest.raises(ConnectionError):
        await web.ask("/v1/broken")
    for number in range(30):
        assert (await web.ask(f"/made-up-{number}")).status == 404
        assert (await web.ask("/metrics", method=f"MADE{number}")).status == 405
    assert web.calls() == {
        ("GET /v1/items/{status}", "200"): 1,
        ("GET /v1/items/{status}", "429"): 1,
        ("GET /v1/broken", "499"): 1,
        (OTHER, "404"): 30,
        (OTHER, "405"): 30,
    }


async def test_the_span_joins_the_callers_trace_and_says_what_was_answered(web: Web) -> None:
    await web.ask("/v1/items/200", headers={"traceparent": PARENT})
    await web.ask("/v1/items/503", headers={"traceparent": "garbage"})
    good, bad = web.exporter.get_finished_spans()
    assert good.name == bad.name == "GET /v1/items/{status}"
    assert good.parent is not None
    assert format(good.parent.span_id, "016x") == "b7ad6b7169203331"
    assert bad.parent is None
    assert (
        dict(good.attributes or {}).items()
        >= {
            "http.request.method": "GET",
            "http.route": "/v1/items/{status}",
            "http.response.status_code": 200,
            "client.address": "10.1.2.3",
        }.items()
    )
    assert (good.status.status_code, bad.status.status_code) == (StatusCode.UNSET, StatusCode.ERROR)
    assert (bad.attributes or {})["error.type"] == "503"


async def test_a_load_report_comes_to_who_asks(web: Web) -> None:
    web.host.stats = EngineStats(running=4, max_batch_size=8)
    assert orca.HEADER not in (await web.ask("/v1/items/200")).headers
    assert orca.HEADER not in (await web.ask("/v1/items/200", headers={orca.FORMAT_HEADER: "BIN"})).headers
    answer = await web.ask("/v1/items/200", headers={orca.FORMAT_HEADER: "JSON"})
    assert json.loads(answer.headers[orca.HEADER].removeprefix("JSON "))["application_utilization"] == 0.5
