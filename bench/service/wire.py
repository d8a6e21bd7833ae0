"""As much of HTTP/1.1, HTTP/2 and gRPC as it takes to ask for one stream per connection and to see what came when.

Written for the client's own cost: while the clock runs, frames are told apart and kept; what they say is read later.
Sources: RFC 9113 (frames, settings), RFC 7541 6.2.2 (headers as literals), gRPC over HTTP/2 (message prefix).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
STREAM = 1  # the only one of a connection
FRAME_BYTES, PREFIX_BYTES = 9, 5
LARGEST_WINDOW = 2**31 - 1
TABLE_SIZE, ENABLE_PUSH, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 1, 2, 4, 5
LAST_CHUNK = b"\r\n0\r\n\r\n"

Chunk = tuple[float, bytes]
"""What arrived, and when."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def greeting() -> bytes:
    """Begins a connection on which the server never has to wait for the client to read."""
    settings = {TABLE_SIZE: 0, ENABLE_PUSH: 0, INITIAL_WINDOW_SIZE: LARGEST_WINDOW, MAX_FRAME_SIZE: 2**20}
    payload = b"".join(struct.pack(">HI", *each) for each in settings.items())
    window = struct.pack(">I", LARGEST_WINDOW - 65_535)
    return PREFACE + frame(SETTINGS, 0, 0, payload) + frame(WINDOW_UPDATE, 0, 0, window)


def grpc_call(path: str, authority: str, message: bytes, metadata: Mapping[str, str]) -> bytes:
    """One RPC of one message, whole."""
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": authority,
        "te": "trailers",
        "content-type": "application/grpc",
        **metadata,
    }
    block = b"".join(b"\x00" + _text(name) + _text(value) for name, value in headers.items())
    body = struct.pack(">BI", 0, len(message)) + message
    return frame(HEADERS, END_HEADERS, STREAM, block) + frame(DATA, END_STREAM, STREAM, body)


def http_post(path: str, authority: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"host: {authority}", "content-type: application/json"]
    lines += [f"content-length: {len(body)}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _text(text: str) -> bytes:
    assert len(text) < 127, "longer ones have a length of several bytes"
    return bytes([len(text)]) + text.encode()


class GrpcReader:
    """The client's side of a connection.

    Attributes:
        chunks: the payload of every DATA frame.
        ended: the server has ended the RPC.
    """

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.ended = False
        self._rest = b""

    def feed(self, data: bytes, now: float) -> bytes:
        """Take what arrived; returns what is to be sent back."""
        data = self._rest + data if self._rest else data
        at, size, answer = 0, len(data), b""
        while size - at >= FRAME_BYTES:
            end = at + FRAME_BYTES + int.from_bytes(data[at : at + 3], "big")
            if end > size:
                break
            kind, flags = data[at + 3], data[at + 4]
            if kind == DATA:
                self.chunks.append((now, data[at + FRAME_BYTES : end]))
            elif kind in (SETTINGS, PING) and not flags & ACK:
                answer += frame(kind, ACK, 0, data[at + FRAME_BYTES : end] if kind == PING else b"")
            if kind in (RST_STREAM, GOAWAY) or (kind in (DATA, HEADERS) and flags & END_STREAM):
                self.ended = True
            at = end
        self._rest = data[at:]
        return answer

    def messages(self) -> Iterator[Chunk]:
        """Each message with the time at which it was complete."""
        waiting = bytearray()
        for now, payload in self.chunks:
            waiting += payload
            while len(waiting) >= PREFIX_BYTES:
                end = PREFIX_BYTES + int.from_bytes(waiting[1:PREFIX_BYTES], "big")
                if len(waiting) < end:
                    break
                yield now, bytes(waiting[PREFIX_BYTES:end])
                del waiting[:end]


class SseReader:
    """The same of one answer of server-sent events in chunks."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.ended = False
        self._tail = b""

    def feed(self, data: bytes, now: float) -> bytes:
        self.chunks.append((now, data))
        self._tail = (self._tail + data)[-len(LAST_CHUNK) :]
        self.ended = self._tail == LAST_CHUNK
        return b""

    def messages(self) -> Iterator[Chunk]:
        """The data of each event. Raises RuntimeError: the answer is no stream of events."""
        waiting, at_body = bytearray(), False
        for now, data in self.chunks:
            waiting += data
            if not at_body:
                head, found, rest = bytes(waiting).partition(b"\r\n\r\n")
                if not found:
                    continue
                if b"text/event-stream" not in head:
                    raise RuntimeError(f"the answer is no stream of events: {bytes(waiting[:500])!r}")
                waiting, at_body = bytearray(rest), True
            while (event := waiting.find(b"data: ")) >= 0 and (end := waiting.find(b"\n\n", event)) >= 0:
                yield now, bytes(waiting[event + 6 : end])
                del waiting[: end + 2]


Reader = GrpcReader | SseReader
