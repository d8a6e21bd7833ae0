"""Messages across the process border, and their framing: 4 bytes of length, big-endian, then one msgpack message.

    parent ──Start(config)──────────────► worker          first message, once
           ◄─Loading(phase, done)────────                 at least once a second while loading
           ◄─Ready(info) | Failed(kind, message)          once
           ──Submit | Cancel─────────────►
           ──LoadAdapter | UnloadAdapter─►
           ──SetVocabulary───────────────►                once, before grammars
           ◄─StepOutput(events, stats, answers)           one per step; at least once a second
           ──end of file─────────────────►                the worker ends

The socket pair is inherited by the worker alone: there is no port, no file, and nothing to authenticate.
"""

from __future__ import annotations

import msgspec

from engine.config import EngineConfig
from engine.errors import EngineError, error_of
from engine.face import Done
from engine.loop import Cancel, LoadAdapter, SetVocabulary, StepOutput, Submit, UnloadAdapter
from engine.request import EngineInfo

HEADER_BYTES = 4
MAX_FRAME_BYTES = 64 * 2**20  # a prompt of 128K token ids takes less than 1 MiB, Tekken's vocabulary 1.3 MiB


class Start(msgspec.Struct, frozen=True, tag=True):
    config: EngineConfig


class Loading(msgspec.Struct, frozen=True, tag=True):
    phase: str
    done: Done


class Ready(msgspec.Struct, frozen=True, tag=True):
    info: EngineInfo


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The worker ends. `kind` is the name of an engine error, or anything else for a failure of our own."""

    kind: str
    message: str


ToWorker = Start | Submit | Cancel | LoadAdapter | UnloadAdapter | SetVocabulary
FromWorker = Loading | Ready | Failed | StepOutput

_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


def encode(message: ToWorker | FromWorker) -> bytes:
    """A whole frame.

    Raises:
        ValueError: the message is longer than MAX_FRAME_BYTES.
    """
    return frame(_encoder.encode(message))


def frame(body: bytes) -> bytes:
    """A message with its length before it. Raises ValueError if it is longer than MAX_FRAME_BYTES."""
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(body)} bytes is longer than {MAX_FRAME_BYTES}")
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def body_length(header: bytes) -> int:
    """Bytes of the message that follows. Raises msgspec.DecodeError for more than MAX_FRAME_BYTES."""
    length = int.from_bytes(header, "big")
    if length > MAX_FRAME_BYTES:
        raise msgspec.DecodeError(f"a frame of {length} bytes is longer than {MAX_FRAME_BYTES}")
    return length


def decode_to_worker(body: bytes | memoryview) -> ToWorker:
    """Raises msgspec.DecodeError for anything that is not such a message."""
    return _to_worker.decode(body)


def decode_from_worker(body: bytes | memoryview) -> FromWorker:
    """Raises msgspec.DecodeError for anything that is not such a message."""
    return _from_worker.decode(body)


def to_error(failed: Failed) -> EngineError:
    """The error that the worker ended with, as the type that it had there."""
    return error_of(failed.kind, failed.message)
