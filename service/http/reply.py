"""Answers as ASGI applications: JSON that takes time to make, and streams of server-sent events.

Both listen while they work: a client that goes away cancels the work at once, and so frees what it holds.

Nothing of a stream is sent before its first event is there, so that whatever fails before has a status of its own
(429, 503, 408, …) and can be repeated by the client or a proxy. Nor is the wait filled with comments, which would end
that. Proxies must allow a first byte as late as the longest queue and prefill; see docs/http.md.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from service.errors import Code, ServiceError
from service.http.errors import RouteError, body_of, headers_of, status_of

log = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 1.0  # for a reader to take the last event, when the server stops
DONE = b"data: [DONE]\n\n"
EVENT_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events otherwise
]
T = TypeVar("T")


def event(value: object) -> bytes:
    """One server-sent event with a JSON object."""
    return b"data: %b\n\n" % msgspec.json.encode(value)


def fault(error: BaseException) -> ServiceError:
    """What a client is told of a mistake of ours: an id. The rest is in the log."""
    reference = secrets.token_hex(8)
    log.error("a request failed", exc_info=error, extra={"error_id": reference})
    return ServiceError(Code.INTERNAL, f"internal error {reference}")


async def send_json(send: Send, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
    body = msgspec.json.encode(value)
    raw = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    raw += [(name.encode("latin-1"), text.encode("latin-1")) for name, text in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: ServiceError | RouteError) -> None:
    await send_json(send, body_of(error), status_of(error), headers_of(error))


class Json:
    """A value that is there already."""

    def __init__(self, value: object, status: int = 200) -> None:
        self._value = value
        self._status = status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, self._value, self._status)


class JsonLater:
    """A value that is waited for until it is there or the client goes away."""

    def __init__(self, value: Coroutine[Any, Any, object]) -> None:
        self._value = value

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, await unless_gone(receive, self._value))


class EventStream:
    """Server-sent events. The generator is closed whatever happens.

    An error after the first event is the last event. A slow reader slows the generator: the transport buffers 64 KiB.
    """

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        self._events = events
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send_all(send))
        except asyncio.CancelledError:  # by the server, which stops
            if not self._started:
                raise
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORDS_SECONDS):
                    await self._end(send, ServiceError(Code.UNAVAILABLE, "the server is shutting down"))

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            try:
                async for each in events:
                    if not self._started:
                        await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM_HEADERS})
                        self._started = True
                    await send({"type": "http.response.body", "body": each, "more_body": True})
            except Exception as error:
                if not self._started:
                    raise
                await self._end(send, error if isinstance(error, ServiceError) else fault(error))
            else:
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _end(self, send: Send, error: ServiceError) -> None:
        await send({"type": "http.response.body", "body": event(body_of(error)), "more_body": False})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. If the client goes first, or this is cancelled, the work is cancelled and awaited.

    Raises:
        ClientDisconnect: the client has gone.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
