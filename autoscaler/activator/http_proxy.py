"""The HTTP port: requests are held until a replica takes them, and its answer is passed on as it comes.

- A body is read whole, within its limits of size and time, before a replica is asked for: so that it can be sent anew.
- An answer flows through, chunk by chunk: who does not read stops who writes.
- A client that goes away frees its place, or cancels its request at the replica, at once.
- `"stream": true` that is held longer than `comment_after_seconds` is answered at once, 200 and comments that say how
  far the replica is: proxies and people see life. The price: whatever goes wrong later is an event, as it is after the
  first token, and no status that a client would retry by itself.
- Connections end with the answer that they waited for: the next one finds a replica instead of us.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
from starlette.requests import Request
from starlette.routing import Router
from starlette.types import Receive, Scope, Send

from autoscaler.activator.channels import CONNECT_SECONDS, bracketed
from autoscaler.activator.hold import REST_SECONDS, Held, Room
from autoscaler.activator.http_answer import Answer, BrokenOff, Whole, read_whole
from autoscaler.activator.http_replies import RouteError, own_routes, request_id_of
from autoscaler.activator.http_request import onward, read, wishes_of
from autoscaler.activator.http_server import port_for
from autoscaler.activator.refused import Gone, Reason, Refused
from autoscaler.activator.replica import Replica
from autoscaler.activator.settings import TlsFiles
from autoscaler.activator.tls import ClientContext

log = logging.getLogger(__name__)

WRITE_SECONDS = 60.0  # for a replica to take what is sent
KEPT_SECONDS = 5.0  # connections to replicas, which close theirs after 75
COMMENT_SECONDS = 2.0  # between two comments


class HttpProxy:
    """Start and stop of the port. Belongs to one event loop."""

    def __init__(self, room: Room, tls: TlsFiles | None = None) -> None:
        self._room = room
        self._tls = tls
        self._trusted = ClientContext(tls) if tls is not None else None
        # A replica that does not begin to answer for so long is given up.
        timeout = httpx.Timeout(
            connect=CONNECT_SECONDS, read=room.limits.hold_seconds, write=WRITE_SECONDS, pool=CONNECT_SECONDS
        )
        self._client = httpx.AsyncClient(
            verify=self._trusted.context if self._trusted is not None else False,
            trust_env=False,
            follow_redirects=False,
            timeout=timeout,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEPT_SECONDS),
        )
        self._server = port_for(Router(own_routes(room), default=self._forward, redirect_slashes=False), tls)

    async def start(self, address: str) -> int:
        """Listen on HOST:PORT, port 0 for any free one. Returns the port.

        Raises:
            OSError: the address cannot be bound.
        """
        return await self._server.start(address)

    async def stop(self, grace: float) -> None:
        """Refuse new connections at once, let running requests end for `grace` seconds, then cancel them."""
        await self._server.stop(grace)
        await self._client.aclose()

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        answer = Answer(send, request_id_of(request))
        if not request.scope["raw_path"].startswith(b"/"):  # `*`, or the address of another server
            await answer.error(RouteError(400, "bad_request", "the target must be a path"))
            return
        with suppress(Gone):
            try:
                with self._room.enter() as held:
                    body = await read(request, held, self._room.limits.largest_request)
                    await unless_gone(receive, _Exchange(self, request, body, answer, held).run())
            except (Refused, RouteError) as error:
                await answer.error(error)
            except (BrokenOff, Gone):
                raise  # the one ends the connection, of which uvicorn says nothing; the other has ended it
            except Exception:  # a fault of ours: the client learns an id, the log the rest
                log.exception("a request failed", extra={"error_id": answer.request_id.decode()})
                await answer.error(RouteError(500, "internal", f"internal error {answer.request_id.decode()}"))
            except asyncio.CancelledError:  # by the server, which stops
                await answer.error(Refused(Reason.CLOSING, "the activator is shutting down; retry", 1.0))

    @property
    def room(self) -> Room:
        return self._room

    @asynccontextmanager
    async def to(
        self, replica: Replica, request: Request, body: bytes, request_id: bytes
    ) -> AsyncIterator[httpx.Response]:
        """Send a request to a replica. Its answer, whose body is still to come.

        Raises:
            httpx.TransportError: there is none.
        """
        if self._trusted is not None:
            self._trusted.renew()
        scheme = "http" if self._tls is None else "https"
        target: bytes = request.scope["raw_path"] + (b"?" + query if (query := request.scope["query_string"]) else b"")
        url = httpx.URL(f"{scheme}://{bracketed(replica.host)}:{replica.http_port}").copy_with(raw_path=target)
        # Not built by the client, which would add headers of its own
        outgoing = httpx.Request(
            request.method,
            url,
            headers=onward(request, request_id),
            content=body,
            extensions={} if self._tls is None else {"sni_hostname": self._tls.server_name},
        )
        outgoing.extensions["timeout"] = self._client.timeout.as_dict()
        response = await self._client.send(outgoing, stream=True)
        try:
            yield response
        finally:
            await response.aclose()


class _Exchange:
    """One request of a client, whose body is here, until its answer has ended."""

    def __init__(self, proxy: HttpProxy, request: Request, body: bytes, answer: Answer, held: Held) -> None:
        self._proxy = proxy
        self._request = request
        self._body = body
        self._answer = answer
        self._held = held
        self._last: Whole | None = None  # with which a replica could not serve it
        self._comments: asyncio.Task[None] | None = None

    async def run(self) -> None:
        wishes = wishes_of(self._request, self._body)
        if wishes.timeout is not None:
            self._held.deadline = self._held.arrived + wishes.timeout
        if wishes.stream and self._proxy.room.limits.comment_after_seconds is not None:
            self._comments = asyncio.create_task(self._comment(), name="activator-comments")
        try:
            while not await self._attempt(await self._held.turn()):
                pass
        except Refused as refused:
            await self._no_more_comments()
            if self._last is None or refused.reason is Reason.DEADLINE:
                raise
            await self._answer.whole(self._last)  # what a replica has said of it says more
        finally:
            await self._no_more_comments()

    async def _attempt(self, replica: Replica) -> bool:
        """Hand it to one replica. Whether it has been answered; else another may be asked.

        Raises:
            Refused, RouteError: none may.
        """
        held = self._held
        left = None if held.deadline is None else held.deadline - self._proxy.room.now()
        try:
            async with (
                asyncio.timeout(left) as limit,
                self._proxy.to(replica, self._request, self._body, self._answer.request_id) as response,
            ):
                hint = _retry_after(response)
                if (response.status_code == 429 and hint is not None) or response.status_code == 503:
                    self._last = await read_whole(response)
                    if response.status_code == 429 and hint is not None:
                        held.refused(hint)
                        return False
                    return self._lost(reached=True)
                limit.reschedule(None)
                held.started()
                self._body = b""
                await self._no_more_comments()
                await self._answer.of(response)
                return True
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout):
            return self._lost(reached=False)
        except TimeoutError:
            raise held.late() from None
        except httpx.ReadTimeout:
            seconds = self._proxy.room.limits.hold_seconds
            held.started()  # its time is over, here and at every other
            raise RouteError(504, "timeout", f"the replica did not answer within {seconds:g} s") from None
        except httpx.TransportError:
            return self._lost(reached=True)

    def _lost(self, *, reached: bool) -> bool:
        if not self._held.lost(reached=reached):
            raise Refused(Reason.LOST, "replicas were lost while they had the request", REST_SECONDS)
        return False

    async def _comment(self) -> None:
        """Say how it goes, from when it has waited long enough on."""
        room = self._proxy.room
        assert room.limits.comment_after_seconds is not None
        await asyncio.sleep(room.limits.comment_after_seconds)
        while True:
            if not self._held.waits:
                words = "a replica has the request" if self._answer.commented else ""
            else:
                words = "waiting for a place at a replica" if room.replicas else room.words
            if words:
                await self._answer.comment(words)
            await asyncio.sleep(COMMENT_SECONDS)

    async def _no_more_comments(self) -> None:
        if self._comments is not None:
            self._comments.cancel()
            await asyncio.gather(self._comments, return_exceptions=True)
            self._comments = None


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the replica asks to wait."""
    exact, whole = response.headers.get("retry-after-ms", ""), response.headers.get("retry-after", "")
    if exact.isdigit():
        return int(exact) / 1000
    return float(whole) if whole.isdigit() else None


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work. If the client goes first, or this is cancelled, the work is cancelled and awaited.

    Raises:
        Gone: the client has.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
