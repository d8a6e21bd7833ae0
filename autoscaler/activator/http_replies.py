"""What the HTTP port says itself: errors in OpenAI's shape, server-sent comments, health and metrics."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector, CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Send

from autoscaler.activator.hold import Room
from autoscaler.activator.refused import Reason, Refused

STATUS = {
    Reason.FULL: (429, "rate_limit_error", "resource_exhausted"),
    Reason.DEADLINE: (408, "timeout_error", "deadline_exceeded"),
    Reason.TIMEOUT: (503, "server_error", "unavailable"),
    Reason.LOST: (503, "server_error", "unavailable"),
    Reason.CLOSING: (503, "server_error", "unavailable"),
}
EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events otherwise
]
MAX_REQUEST_ID = 128
Headers = list[tuple[bytes, bytes]]


class RouteError(Exception):
    """What is wrong with a request itself, or with the answer of a replica: status, and code for programs."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


def body_of(error: Refused | RouteError) -> bytes:
    """`{"error": {"message", "type", "param", "code"}}`"""
    if isinstance(error, Refused):
        _, kind, code = STATUS[error.reason]
    else:
        kind, code = "invalid_request_error" if error.status < 500 else "server_error", error.code
    return msgspec.json.encode({"error": {"message": error.message, "type": kind, "param": None, "code": code}})


def status_of(error: Refused | RouteError) -> int:
    return error.status if isinstance(error, RouteError) else STATUS[error.reason][0]


def headers_of(error: Refused | RouteError) -> Headers:
    """When to come again: in whole seconds for everybody, in milliseconds for the official client."""
    if isinstance(error, RouteError) or error.retry_after is None:
        return []
    return retry_headers(error.retry_after)


def retry_headers(seconds: float) -> Headers:
    whole, exact = max(1, math.ceil(seconds)), math.ceil(1000 * seconds)
    return [(b"retry-after", b"%d" % whole), (b"retry-after-ms", b"%d" % exact)]


async def send_error(send: Send, error: Refused | RouteError, request_id: bytes) -> None:
    body = body_of(error)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", request_id),
        *headers_of(error),
    ]
    await send({"type": "http.response.start", "status": status_of(error), "headers": headers})
    await send({"type": "http.response.body", "body": body})


def event(body: bytes) -> bytes:
    """One server-sent event, whatever lines the body has."""
    return b"".join(b"data: %b\n" % line for line in body.splitlines() or [b""]) + b"\n"


def comment(words: str) -> bytes:
    """What clients of server-sent events ignore, and people and proxies see."""
    return b": %b\n\n" % " ".join(words.split()).encode()


def request_id_of(request: Request) -> bytes:
    """The client's own, if it can be one, or a new one."""
    given = request.headers.get("x-request-id", "")
    usable = 0 < len(given) <= MAX_REQUEST_ID and given.isascii() and given.isprintable()
    return (given if usable else secrets.token_hex(8)).encode()


# -- what no replica is woken for -------------------------------------------------------------------------------------


def own_routes(room: Room) -> list[Route]:
    """Health and metrics. With replicas, ready is 200 here, too: what is sent is answered."""
    registry = CollectorRegistry()
    registry.register(_Figures(room))

    def live(request: Request) -> Response:
        return _json({"live": True}, 200)

    def ready(request: Request) -> Response:
        if room.replicas and not room.closed:
            return _json({"ready": True}, 200)
        return _json({"ready": False, "reason": room.words or "no replica"}, 503, room.refuse(Reason.TIMEOUT, ""))

    def metrics(request: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    routes: Mapping[str, Any] = {
        "/v1/health/live": live,
        "/v2/health/live": live,
        "/v1/health/ready": ready,
        "/v2/health/ready": ready,
        "/health": ready,
        "/metrics": metrics,
        "/v1/metrics": metrics,
    }
    return [Route(path, answer, methods=["GET"]) for path, answer in routes.items()]


def _json(value: object, status: int, hint: Refused | None = None) -> Response:
    response = Response(msgspec.json.encode(value), status, media_type="application/json")
    for name, text in [] if hint is None else headers_of(hint):
        response.headers[name.decode()] = text.decode()
    return response


class _Figures(Collector):
    """Requests that wait are queued, by the name that servers use; so dashboards and alerts go on at zero."""

    def __init__(self, room: Room) -> None:
        self._room = room

    def collect(self) -> Iterable[Metric]:
        room = self._room
        gauges = (
            ("nemoserve_requests_queued", "Requests that wait for a replica.", room.held_requests),
            ("nemoserve_queue_oldest_seconds", "Age of the oldest of them.", room.oldest_held_seconds),
            ("nemoserve_activator_held_bytes", "Of requests without the beginning of an answer.", room.held_bytes),
            ("nemoserve_activator_replicas", "That requests are handed to.", len(room.replicas)),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(name, text, value)
        ends = CounterMetricFamily("nemoserve_activator_requests", "Requests by their end.", labels=["outcome"])
        for outcome in ("answered", "cancelled", "failed", *Reason):
            ends.add_metric([outcome], room.outcomes[outcome])
        yield ends
