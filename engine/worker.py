"""The engine's own process: `python -m engine.worker --fd N`, started by `engine.remote` with one end of a socket pair.

It ends when the other end is closed, and never by a signal meant for the service: SIGINT of the terminal and SIGTERM of
a service manager reach the whole group, and the service wants to drain first.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import select
import signal
import socket
import sys
import threading
import time

import msgspec

from engine.config import EngineConfig
from engine.errors import EngineError
from engine.face import Done
from engine.loop import HEARTBEAT_SECONDS, Command, StepOutput, run_core
from engine.wire import (
    HEADER_BYTES,
    Failed,
    FromWorker,
    Loading,
    Ready,
    Start,
    ToWorker,
    body_length,
    decode_to_worker,
    encode,
)
from process.logs import configure

log = logging.getLogger(__name__)

REPORT_SECONDS = 0.1  # between two messages of a load's progress; a person sees no more of them


class Inbox:
    """Frames from a blocking socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._poll = select.poll()  # unlike select(), for descriptors of any number: it is inherited from a busy server
        self._poll.register(sock, select.POLLIN)

    def receive(self, timeout: float) -> list[ToWorker] | None:
        """Messages that have arrived, waiting at most `timeout` seconds for the first bytes; None at the end of file.

        Raises:
            msgspec.DecodeError: the other side sent what is no message.
        """
        messages: list[ToWorker] = []
        while self._poll.poll(0 if messages else timeout * 1000):
            data = self._sock.recv(2**20)
            if not data:
                return None
            self._buffer += data
            messages += self._complete()
        return messages

    def _complete(self) -> list[ToWorker]:
        messages = []
        while len(self._buffer) >= HEADER_BYTES:
            end = HEADER_BYTES + body_length(bytes(self._buffer[:HEADER_BYTES]))
            if len(self._buffer) < end:
                break
            messages.append(decode_to_worker(bytes(self._buffer[HEADER_BYTES:end])))
            del self._buffer[:end]
        return messages


class Outbox:
    """Whole frames to a blocking socket, from any thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()

    def send(self, message: FromWorker) -> None:
        """Raises OSError when the other side is gone."""
        with self._lock:
            self._sock.sendall(encode(message))


class LoadingBeat:
    """Passes progress on, at most ten times a second, and repeats the latest once a second however long a phase takes.

    Ends the process when nobody listens any more: minutes of loading must not go on beside a restarted service.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._latest = Loading("start", Done(0.0))
        self._sent = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loading-beat", daemon=True)

    def __enter__(self) -> LoadingBeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def report(self, phase: str, done: Done) -> None:
        """A phase's beginning and the last byte are always told: some read of 12B parameters tells 12,000 times."""
        before, self._latest = self._latest, Loading(phase, done)
        now = time.monotonic()
        if phase != before.phase or done.read == done.total or now - self._sent >= REPORT_SECONDS:
            self._sent = now
            self._outbox.send(self._latest)

    def _run(self) -> None:
        while not self._done.wait(HEARTBEAT_SECONDS):
            try:
                self._outbox.send(self._latest)
            except OSError:
                os._exit(1)  # the main thread is deep in torch, and nothing that it holds outlives the process


def serve(sock: socket.socket) -> None:
    """Load what the parent asks for and run its core until the parent closes the socket."""
    inbox, outbox = Inbox(sock), Outbox(sock)
    first = None
    while first is None:
        messages = inbox.receive(HEARTBEAT_SECONDS)
        if messages is None:
            return
        first = messages[0] if messages else None
    if not isinstance(first, Start):
        raise msgspec.DecodeError(f"the first message is {type(first).__name__}, not Start")
    configure(first.config.log_level, as_json=first.config.log_json)
    try:
        _run(first.config, inbox, outbox)
    except EngineError as error:
        outbox.send(Failed(type(error).__name__, str(error)))
    except (BrokenPipeError, ConnectionResetError):
        log.info("the service is gone")


def _run(config: EngineConfig, inbox: Inbox, outbox: Outbox) -> None:
    from engine.core import EngineCore

    with LoadingBeat(outbox) as beat:
        from engine.parallel.leader import load_runner  # torch: seconds of import, under the beat

        core = EngineCore(load_runner(config, beat.report), config)
    gc.freeze()  # a collection would look at all of torch's objects: some 80 ms between two tokens
    outbox.send(Ready(core.info))

    def receive(timeout: float) -> list[Command] | None:
        messages = inbox.receive(timeout)
        if messages is None:
            return None
        commands: list[Command] = []
        for message in messages:
            if isinstance(message, Start):
                raise msgspec.DecodeError("a second Start")
            commands.append(message)
        return commands

    def emit(output: StepOutput) -> None:
        outbox.send(output)

    run_core(core, receive, emit)


def main() -> int:
    parser = argparse.ArgumentParser(prog="engine.worker", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="inherited end of a socket pair")
    configure("info", as_json=False)  # until the service says how
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=parser.parse_args().fd) as sock:
        try:
            serve(sock)
        except msgspec.DecodeError:
            log.exception("the service sent what is no message")
            return 1
        except Exception as error:  # ours or torch's: the service learns of it before the process ends
            log.exception("the engine failed")
            with contextlib.suppress(OSError):
                Outbox(sock).send(Failed("", f"the engine failed: {type(error).__name__}"))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
