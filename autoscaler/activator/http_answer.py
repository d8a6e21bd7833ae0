"""The answer to one request over HTTP: a replica's as it comes, or an error of ours, either after comments or not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import httpx
import msgspec
from starlette.types import Send

from autoscaler.activator.http_replies import EVENT_STREAM, Headers, RouteError, body_of, comment, event, send_error
from autoscaler.activator.refused import Refused

ERROR_BYTES = 64 * 2**10  # of an answer that is passed on as an event, or kept while another replica is asked
EVENT_END = b"\n\n"
# RFC 9110, 7.6.1, and what is made anew for each connection
OF_ONE_HOP = frozenset(
    b"connection keep-alive proxy-connection te trailer transfer-encoding upgrade expect proxy-authorization".split()
)


class BrokenOff(Exception):
    """The rest of an answer is missing, and the connection must end so that the client sees that."""


@dataclass(frozen=True, slots=True)
class Whole:
    """An answer of a replica that has been read."""

    status: int
    headers: Headers
    body: bytes


class Answer:
    """Attributes:
    request_id: the client's, or one made for it.
    commented: it has begun as a stream of events, before anybody knew how it would end.
    """

    def __init__(self, send: Send, request_id: bytes) -> None:
        self.request_id = request_id
        self.commented = False
        self._send = send
        self._started = False
        self._ended = False
        self._tail: bytes | None = None  # of what was sent; None: it is no stream of events

    async def comment(self, words: str) -> None:
        if not self._started:
            self.commented = True
            await self._start(200, [*EVENT_STREAM, (b"x-request-id", self.request_id)], events=True)
        await self._part(comment(words))

    async def of(self, response: httpx.Response) -> None:
        """A replica's, passed on as it comes.

        Raises:
            BrokenOff: the replica was lost on the way.
        """
        events = response.headers.get("content-type", "").startswith("text/event-stream")
        if self.commented and not (response.status_code == 200 and events):
            await self.whole(await read_whole(response))
            return
        if not self.commented:
            await self._start(response.status_code, _back(response.headers.raw), events=events)
        try:
            async for chunk in response.aiter_raw():
                await self._part(chunk)
        except httpx.TransportError:
            await self.error(RouteError(503, "unavailable", "the replica was lost while it answered"))
        else:
            await self._end()

    async def whole(self, whole: Whole) -> None:
        """A replica's that was read before."""
        if self.commented:
            await self._end(event(whole.body if _is_error(whole.body) else body_of(_strange(whole))))
        else:
            await self._start(whole.status, _back(whole.headers))
            await self._end(whole.body)

    async def error(self, error: Refused | RouteError) -> None:
        """Ours: as a whole, or as the last event of a stream that has begun.

        Raises:
            BrokenOff: something else has begun, or an event that has not ended.
        """
        if not self._started:
            self._started = self._ended = True
            await send_error(self._send, error, self.request_id)
        elif self._tail == EVENT_END and not self._ended:
            await self._end(event(body_of(error)))
        else:
            raise BrokenOff from None

    async def _start(self, status: int, headers: Headers, *, events: bool = False) -> None:
        self._started = True
        self._tail = EVENT_END if events else None
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _part(self, data: bytes) -> None:
        if self._tail is not None:
            self._tail = (self._tail + data)[-len(EVENT_END) :]
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def _end(self, data: bytes = b"") -> None:
        self._ended = True
        await self._send({"type": "http.response.body", "body": data, "more_body": False})


async def read_whole(response: httpx.Response) -> Whole:
    """An answer that is short, or as much of it as is told.

    Raises:
        httpx.TransportError: the replica was lost.
    """
    body = b""
    async for part in response.aiter_raw():
        body += part
        if len(body) > ERROR_BYTES:
            break
    headers = [(name, value) for name, value in response.headers.raw if name.lower() != b"content-length"]
    body = body[:ERROR_BYTES]
    return Whole(response.status_code, [*headers, (b"content-length", b"%d" % len(body))], body)


def one_hop(headers: Iterable[tuple[bytes, bytes]]) -> frozenset[bytes]:
    """Names of those that end with the connection; it may name more."""
    named = [value for name, value in headers if name.lower() == b"connection"]
    return OF_ONE_HOP | {each.strip().lower() for value in named for each in value.split(b",")}


def _back(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """A replica's headers for the client, whose next request shall find a replica by itself."""
    headers = list(headers)
    dropped = one_hop(headers) | {b"date"}  # uvicorn adds its own
    return [(name, value) for name, value in headers if name.lower() not in dropped] + [(b"connection", b"close")]


def _is_error(body: bytes) -> bool:
    try:
        return isinstance(found := msgspec.json.decode(body), dict) and "error" in found
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False


def _strange(whole: Whole) -> RouteError:
    return RouteError(max(500, whole.status), "unavailable", f"the replica answered with status {whole.status}")
