"""Renders a checkpoint's chat template in a process that the kernel bounds (`service.text.render`).

    CompiledTemplate ──JSON of markers──► render process: at most MAX_SECONDS, MAX_MEMORY, no files
                     ◄──text or reason──   killed when it passes its time; a new one starts for the next request

One process per template, started with it, ended with it. Renders wait for one another: a chat takes a fraction of a
millisecond there. Every wait has an end, so a hostile template fails requests instead of the server.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

from engine import CheckpointError
from service.errors import Code, ServiceError, invalid
from service.text import render as program

MAX_SOURCE = 256 * 1024  # characters; the largest known templates have about 20,000
MAX_OUTPUT = 2 * 1024 * 1024  # characters of the template's own and of markers, user text not counted
MAX_SECONDS = 2.0  # processor time of one render, and of compiling; ordinary templates take milliseconds
MAX_MEMORY = 256 * 1024 * 1024  # bytes of address space; Python and Jinja take a tenth of it
TOO_DEEP = "JSON of a tool or a call is nested too deeply"
MAX_WAIT = 30.0  # seconds by the clock for one answer, and for one's turn, on a machine that is busy otherwise


class RenderError(Exception):
    """A template cannot be compiled or rendered; the message is one line."""


class CompiledTemplate:
    """A chat template, ready to render. Thread-safe.

    Raises:
        CheckpointError: the source is too long, not Jinja, or passes the bounds.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise CheckpointError(f"chat template: {len(source)} characters, more than {MAX_SOURCE}")
        self._source = source
        self._turn = threading.Lock()
        try:
            self._process = _Process(source)
        except (RenderError, OSError) as error:
            raise CheckpointError(f"chat template: {error}") from None

    def render(self, variables: Mapping[str, Any]) -> str:
        """The rendered text.

        Args:
            variables: JSON values by name.

        Raises:
            ServiceError: INVALID_ARGUMENT, the template refuses the conversation, or passes its bounds; UNAVAILABLE if
                the machine or other requests keep it from answering.
        """
        try:
            request = json.dumps(variables).encode()
        except RecursionError:
            raise invalid("messages", TOO_DEEP) from None
        if not self._turn.acquire(timeout=MAX_WAIT):
            raise ServiceError(Code.UNAVAILABLE, "the chat template is busy; retry later")
        try:
            if not self._process.alive():
                self._process = _Process(self._source)
            return self._process.ask(request)
        except RenderError as error:
            raise invalid("messages", f"the model's chat template refuses this conversation: {error}") from None
        except OSError:  # no process, no memory, no answer in time
            raise ServiceError(Code.UNAVAILABLE, "the chat template cannot be rendered now; retry later") from None
        finally:
            self._turn.release()


class _Process:
    """One render process with the template compiled. Ends when it is no longer referenced, and with this process.

    Raises:
        RenderError: the template cannot be compiled; OSError if the process cannot be started.
    """

    def __init__(self, source: str) -> None:
        environment = {"PYTHONPATH": os.pathsep.join(sys.path)}  # nothing else of ours is its business
        self._socket, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", program.__name__],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment | ({"TZ": os.environ["TZ"]} if "TZ" in os.environ else {}),
                process_group=0,  # Ctrl-C in a terminal is for the server, which may still render while it drains
            )
        except OSError:
            self._socket.close()
            raise
        finally:
            theirs.close()
        self._end = weakref.finalize(self, _end, self._process, self._socket)
        bounds = {"max_seconds": MAX_SECONDS, "max_memory": MAX_MEMORY, "max_output": MAX_OUTPUT}
        try:
            self.ask(json.dumps({"source": source} | bounds).encode())
        except (RenderError, OSError):
            self._end()
            raise

    def alive(self) -> bool:
        return self._end.alive and self._process.poll() is None

    def ask(self, request: bytes) -> str:
        """The answer to one request.

        Raises:
            RenderError: the reason why there is none; TimeoutError if it takes too long. The process may be gone.
        """
        deadline = time.monotonic() + MAX_WAIT

        def receive(size: int) -> bytes:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            return self._socket.recv(size)

        try:
            self._socket.settimeout(MAX_WAIT)
            self._socket.sendall(program.frame(request))
            answer = program.read_frame(receive, 4 * MAX_OUTPUT + 1)
        except TimeoutError:
            self._end()
            raise TimeoutError(f"it gives no answer within {MAX_WAIT:g} seconds") from None
        except (EOFError, OSError, ValueError):
            raise RenderError(self._epitaph()) from None
        text = answer[1:].decode(program.ENCODING, program.ERRORS)
        if answer[:1] != program.OK:
            raise RenderError(text)
        return text

    def _epitaph(self) -> str:
        """Why the process ended."""
        try:
            status = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            status = None
        self._end()
        if status == -signal.SIGPROF:
            return f"it runs longer than {MAX_SECONDS:g} seconds"
        return "it ended the process that renders it"


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()
