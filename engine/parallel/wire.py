"""Messages between the leader and one follower, framed as in `engine.wire`, over a socket pair that is inherited.

leader ──Start(config, rank, store)──► follower      first message, once
       ◄─Met(POINT)───────────────────               it is there, and waits for all others
       ──Meet(POINT)──────────────────►              so are they: go on
       ──Step(plan, masked)───────────►              one per step; nothing comes back
       ──Allowed(masks)───────────────►              behind a masked step: it is computing meanwhile
       ◄─Failed(kind, message)────────               the follower ends
       ──end of file──────────────────►              the follower ends
"""

from __future__ import annotations

import enum
import socket

import msgspec

from engine.config import EngineConfig
from engine.step import StepPlan
from engine.wire import HEADER_BYTES, Failed, body_length, frame


class Point(enum.StrEnum):
    """Where ranks wait for one another before they go on, so that none waits for long inside a collective."""

    STARTED = "started"  # next, they connect
    LOADED = "loaded"  # next, they warm up


class Start(msgspec.Struct, frozen=True, tag=True):
    """`store`: see `engine.parallel.communicator.connect`."""

    config: EngineConfig
    rank: int
    store: str


class Meet(msgspec.Struct, frozen=True, tag=True):
    point: Point


class Step(msgspec.Struct, frozen=True, tag=True):
    plan: StepPlan
    masked: bool = False


class Allowed(msgspec.Struct, frozen=True, tag=True):
    """What `engine.step.Masks` has for the step before."""

    masks: dict[int, bytes]


class Met(msgspec.Struct, frozen=True, tag=True):
    point: Point


ToFollower = Start | Meet | Step | Allowed
FromFollower = Met | Failed

_encoder = msgspec.msgpack.Encoder()
_to_follower: msgspec.msgpack.Decoder[ToFollower] = msgspec.msgpack.Decoder(ToFollower)
_from_follower: msgspec.msgpack.Decoder[FromFollower] = msgspec.msgpack.Decoder(FromFollower)


def encode(message: ToFollower | FromFollower) -> bytes:
    """A whole frame. Raises ValueError if it is too long."""
    return frame(_encoder.encode(message))


def receive_to_follower(sock: socket.socket) -> ToFollower | None:
    """The next message, None at the end of file. Raises msgspec.DecodeError for anything that is no message."""
    body = _receive(sock)
    return None if body is None else _to_follower.decode(body)


def receive_from_follower(sock: socket.socket) -> FromFollower | None:
    """The same in the other direction."""
    body = _receive(sock)
    return None if body is None else _from_follower.decode(body)


def _receive(sock: socket.socket) -> bytes | None:
    header = _exactly(sock, HEADER_BYTES)
    return None if header is None else _exactly(sock, body_length(header))


def _exactly(sock: socket.socket, count: int) -> bytes | None:
    """So many bytes from a blocking socket, None if the other side ends first."""
    received = bytearray()
    while len(received) < count:
        try:
            data = sock.recv(count - len(received))
        except ConnectionError:
            return None
        if not data:
            return None
        received += data
    return bytes(received)
