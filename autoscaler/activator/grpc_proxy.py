"""The gRPC port: every method of every service, as bytes, held until a replica takes it.

client ── read ──► Inbox ── write ──► replica        one message is on its way in each direction: who does not read
client ◄─ write ────────── read ───── replica        stops who writes, and memory has a bound

- Nothing is sent to the client before the replica's first message, not even metadata: until then its own retries are
  safe, and ours are. What it has sent is kept so long, and sent anew to the next replica.
- Status, message, metadata and trailing metadata are the replica's own. All four kinds of methods look the same on the
  wire, so one handler serves them.
- The deadline goes on to the replica, and so does cancellation; the replica's comes back.
- A stream asks for a replica with its first message, not when it is opened: clients keep idle ones.
- Connections are told to go away when they are CONNECTION_SECONDS old, whatever runs on them goes on: the next request
  of a channel then resolves its name anew, and finds a replica instead of us.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import secrets
from collections.abc import Iterable
from typing import Any, NoReturn

import grpc

from autoscaler.activator.channels import Channels
from autoscaler.activator.hold import Held, Room
from autoscaler.activator.inbox import Inbox
from autoscaler.activator.own_rpcs import own_rpcs
from autoscaler.activator.refused import Reason, Refused
from autoscaler.activator.replica import Replica
from autoscaler.activator.settings import TlsFiles
from autoscaler.activator.tls import server_credentials

log = logging.getLogger(__name__)

CONNECTION_SECONDS = 20.0  # about as long as endpoints take to change everywhere
FOREVER_MS = 2**31 - 1
HEADER_BYTES = 16 * 2**10  # as the servers take
HANDSHAKE_MS = 15_000
# Metadata of one connection, or made anew by gRPC for each
OF_ONE_HOP = frozenset({"user-agent", "te", "content-type", "host", "connection", "keep-alive", "transfer-encoding"})
# How an RPC ends whose replica dies or stops; our client has not cancelled it, or this would not be asked.
LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
# Triton's word for KServe's `timeout` parameter, whose status is that of a lost replica: the time is over everywhere.
FINAL = "Request timeout expired"
STATUS = {
    Reason.FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.TIMEOUT: grpc.StatusCode.UNAVAILABLE,
    Reason.LOST: grpc.StatusCode.UNAVAILABLE,
    Reason.CLOSING: grpc.StatusCode.UNAVAILABLE,
}
Context = grpc.aio.ServicerContext[Any, Any]
Metadata = tuple[tuple[str, str | bytes], ...]


class GrpcProxy(grpc.GenericRpcHandler):
    """Start and stop of the port. Belongs to one event loop.

    Args:
        connection_seconds: after which a connection is told to go away.
    """

    def __init__(
        self, room: Room, tls: TlsFiles | None = None, *, connection_seconds: float = CONNECTION_SECONDS
    ) -> None:
        self._room = room
        self._tls = tls
        self._channels = Channels(tls)
        self._own = own_rpcs(room)
        options = [
            ("grpc.max_receive_message_length", room.limits.largest_request),
            ("grpc.max_send_message_length", -1),
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.so_reuseport", 0),
            ("grpc.max_metadata_size", HEADER_BYTES),
            ("grpc.absolute_max_metadata_size", HEADER_BYTES),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
            ("grpc.max_connection_age_ms", round(1000 * connection_seconds)),
            ("grpc.max_connection_age_grace_ms", FOREVER_MS),
        ]
        self._server = grpc.aio.server(options=options)
        self._server.add_generic_rpc_handlers((self,))

    async def start(self, address: str) -> int:
        """Listen on HOST:PORT, port 0 for any free one. Returns the port.

        Raises:
            OSError: the address cannot be bound.
        """
        try:
            port: int
            if self._tls is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, server_credentials(self._tls))
        except RuntimeError:
            raise OSError(f"cannot listen on {address} for gRPC: it is in use or not of this machine") from None
        await self._server.start()
        return port

    async def stop(self, grace: float) -> None:
        """Refuse new RPCs at once, let running ones end for `grace` seconds, then cancel them."""
        await self._server.stop(grace)
        await self._channels.close()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler of any method: ours while nobody else could answer, else what forwards it."""
        method: str = handler_call_details.method
        own = self._own.get(method)
        if own is not None and (own.always or not self._room.replicas):
            return own.handler

        async def forward(_: Any, context: Context) -> None:
            await _Call(self._room, self._channels, method, context).run()

        return grpc.stream_stream_rpc_method_handler(forward)


class _Call:
    """One RPC of a client."""

    def __init__(self, room: Room, channels: Channels, method: str, context: Context) -> None:
        self._room = room
        self._channels = channels
        self._method = method
        self._context = context
        self._last: grpc.aio.AioRpcError | None = None  # with which a replica could not serve it

    async def run(self) -> None:
        remaining = self._context.time_remaining()
        deadline = None if remaining is None else self._room.now() + remaining
        try:
            with self._room.enter(deadline) as held:
                end = await self._forward(held)
        except Refused as refused:
            # What a replica has said of it says more than that nothing followed.
            if self._last is None or refused.reason is Reason.DEADLINE:
                await refuse(self._context, refused)
            end = self._last
        except grpc.aio.AbortError:
            raise
        except grpc.aio.InternalError:  # the answer cannot be sent: the client has gone, and this is about to be told
            raise asyncio.CancelledError("the client has gone") from None
        except Exception:  # a fault of ours: the client learns an id, the log the rest
            reference = secrets.token_hex(8)
            log.exception("an RPC failed", extra={"error_id": reference})
            await self._context.abort(grpc.StatusCode.INTERNAL, f"internal error {reference}")
        if end is not None:
            await self._context.abort(end.code(), end.details() or "", _cleaned(end.trailing_metadata()))

    async def _forward(self, held: Held) -> grpc.aio.AioRpcError | None:
        """The error that the RPC ends with; None: it went well."""
        inbox = Inbox(self._context.read, held)
        try:
            await inbox.first()
            while True:
                replica = await held.turn()
                end = await self._attempt(replica, inbox, held)
                if end is None or held.is_started or not self._again(held, inbox, end):
                    return end
        finally:
            inbox.close()

    def _again(self, held: Held, inbox: Inbox, end: grpc.aio.AioRpcError) -> bool:
        """Whether a replica may be asked anew, after this end without an answer; if not, it is the answer."""
        self._last = end
        if end.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and (hint := _retry_after(end)) is not None:
            held.refused(hint)
            return inbox.repeatable
        if end.code() in LOST and end.details() != FINAL:
            return held.lost(reached=not isinstance(end, _NotReached)) and inbox.repeatable
        held.started()
        return False

    async def _attempt(self, replica: Replica, inbox: Inbox, held: Held) -> grpc.aio.AioRpcError | None:
        """Hand it to one replica. The error that this ended with, None if it ended well."""
        async with self._channels.to(replica) as channel:
            if channel is None:
                return _NotReached(replica)
            call: Any = channel.stream_stream(self._method)(
                timeout=self._context.time_remaining(), metadata=_cleaned(self._context.invocation_metadata())
            )
            sending = asyncio.create_task(_send(inbox, call), name="activator-send")
            try:
                await self._answer(call, inbox, held)
                return None
            except grpc.aio.AioRpcError as error:
                return error
            finally:
                call.cancel()
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)

    async def _answer(self, call: Any, inbox: Inbox, held: Held) -> None:
        message = await call.read()
        held.started()
        inbox.forget()
        await self._context.send_initial_metadata(_cleaned(await call.initial_metadata()))
        while message is not grpc.aio.EOF:
            await self._context.write(message)
            message = await call.read()
        self._context.set_trailing_metadata(_cleaned(await call.trailing_metadata()))
        self._context.set_details(await call.details() or "")


class _NotReached(grpc.aio.AioRpcError):
    def __init__(self, replica: Replica) -> None:
        nothing = grpc.aio.Metadata()
        message = f"replica {replica.name} was not reached"
        super().__init__(grpc.StatusCode.UNAVAILABLE, nothing, nothing, details=message)


async def _send(inbox: Inbox, call: Any) -> None:
    """All that the client sends, from its first message on."""
    try:
        await call.wait_for_connection()
        for number in itertools.count():
            if (message := await inbox.get(number)) is None:
                break
            # `call.write` makes INTERNAL of a write that comes too late, whatever status the replica has ended the RPC
            # with (grpc 1.85): what it calls itself does not.
            await call._cython_call.send_serialized_message(message)
        await call.done_writing()
    except (grpc.aio.AioRpcError, grpc.aio.InternalError):
        pass  # the replica has ended it, as the other direction will see


async def refuse(context: Context, refused: Refused) -> NoReturn:
    """End the RPC as a server does that has no place: with a hint for people's code, and one for gRPC's own retries."""
    trailing: tuple[tuple[str, str], ...] = ()
    if refused.retry_after is not None:
        hint = str(math.ceil(1000 * refused.retry_after))
        trailing = (("retry-after-ms", hint), ("grpc-retry-pushback-ms", hint))
    await context.abort(STATUS[refused.reason], refused.message, trailing)
    raise AssertionError("abort always raises")  # its type does not say so


def _cleaned(metadata: Iterable[Any] | None) -> Metadata:
    """What a proxy passes on: all but what belongs to one connection, and what gRPC makes itself."""
    return tuple((key, value) for key, value in metadata or () if key not in OF_ONE_HOP)


def _retry_after(error: grpc.aio.AioRpcError) -> float | None:
    """Seconds that the replica asks to wait, None where coming again would not help."""
    for key, value in error.trailing_metadata() or ():
        if key == "retry-after-ms" and isinstance(value, str) and value.isdigit():
            return int(value) / 1000
    return None
