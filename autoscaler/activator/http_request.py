"""A request over HTTP as far as the activator understands it: its body, its wishes, and its headers for a replica."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, Request

from autoscaler.activator.hold import Held
from autoscaler.activator.http_answer import one_hop
from autoscaler.activator.http_replies import Headers, RouteError
from autoscaler.activator.refused import Gone

BODY_SECONDS = 60.0  # for a whole body to arrive, as at the servers
GENERATION = ("/v1/chat/completions", "/v1/completions")


class _Body(msgspec.Struct):
    stream: Any = False
    timeout: Any = None


@dataclass(frozen=True, slots=True)
class Wishes:
    """Attributes:
    stream: the answer will be server-sent events.
    timeout: seconds after which the client waits no longer.
    """

    stream: bool = False
    timeout: float | None = None


def wishes_of(request: Request, body: bytes) -> Wishes:
    """What servers read of a generation. What makes no sense is no wish: the server that it is sent to will say so."""
    if request.method != "POST" or request.url.path not in GENERATION:
        return Wishes()
    try:
        asked = msgspec.json.decode(body, type=_Body)
        seconds = request.headers.get("x-request-timeout") if asked.timeout is None else asked.timeout
        timeout = None if seconds is None or isinstance(seconds, bool) else float(seconds)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, TypeError, ValueError):
        return Wishes()
    return Wishes(asked.stream is True, timeout if timeout is not None and 0 < timeout < math.inf else None)


async def read(request: Request, held: Held, max_bytes: int) -> bytes:
    """The body, for which there is a place.

    Raises:
        Refused: there is none.
        Gone: the client has.
        RouteError: it is too large, or takes too long.
    """
    too_large = RouteError(413, "body_too_large", f"the body has more than {max_bytes} bytes")
    if int(request.headers.get("content-length", "0")) > max_bytes:  # the HTTP parser lets digits pass alone
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > max_bytes:
                    raise too_large
                held.keep(len(part))
                parts.append(part)
    except ClientDisconnect:
        raise Gone from None
    except TimeoutError:
        raise RouteError(408, "timeout", f"the body did not arrive within {BODY_SECONDS:.0f} seconds") from None
    return b"".join(parts)


def onward(request: Request, request_id: bytes) -> Headers:
    """Headers for the replica: the client's, without those of its connection, and where it came from at the end of
    `x-forwarded-for`. Whether it believes that is the replica's choice."""
    dropped = one_hop(request.headers.raw) | {b"x-forwarded-for", b"x-request-id", b"content-length"}
    headers = [(name, value) for name, value in request.headers.raw if name not in dropped]
    way = [value for name, value in request.headers.raw if name == b"x-forwarded-for"]
    if request.client is not None:
        way.append(request.client.host.encode())
    headers += [(b"x-forwarded-for", b", ".join(way)), (b"x-request-id", request_id)]
    if b"x-forwarded-proto" not in dict(headers):
        headers.append((b"x-forwarded-proto", request.scope["scheme"].encode()))
    return headers
