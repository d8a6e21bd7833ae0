"""The engine with its core in a process of its own: no protocol work delays a step, and each side survives the other.

The parent never imports torch. See `engine.wire` for what crosses the border and `engine.worker` for the other side.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys

import msgspec

from engine.config import EngineConfig
from engine.errors import EngineDeadError
from engine.face import LoadProgress
from engine.loop import Command, StepOutput
from engine.mailbox import MailboxEngine
from engine.request import EngineInfo
from engine.wire import (
    HEADER_BYTES,
    Failed,
    FromWorker,
    Loading,
    Ready,
    Start,
    body_length,
    decode_from_worker,
    encode,
    to_error,
)

log = logging.getLogger(__name__)

# -P: a folder named `engine` where the server is started must not be taken for ours.
WORKER = (sys.executable, "-P", "-m", "engine.worker")
EXIT_SECONDS = 10.0  # a worker in the middle of a long step ends after it
_SOCKET_BUFFER = 4 * 2**20  # several steps of events: the worker does not wait while this side is busy


class RemoteEngine(MailboxEngine):
    """See `engine.face.Engine`. Use `start`."""

    def __init__(self, info: EngineInfo, worker: Worker) -> None:
        super().__init__(info)
        self._worker = worker
        self._pump = asyncio.create_task(self._receive(), name="engine-events")

    @classmethod
    async def start(cls, config: EngineConfig, progress: LoadProgress = lambda phase, done: None) -> RemoteEngine:
        """Start the process and load the model in it.

        Raises:
            CheckpointError, EngineConfigError: the model cannot be loaded.
            EngineDeadError: the process ended or failed while loading.
        """
        worker = await Worker.spawn()
        try:
            worker.send(Start(config))
            while True:
                match await worker.receive():
                    case Loading(phase, done):
                        progress(phase, done)
                    case Ready(info):
                        return cls(info, worker)
                    case Failed() as failed:
                        raise to_error(failed)
                    case message:
                        raise EngineDeadError(f"the engine sent {type(message).__name__} while loading")
        except BaseException:
            worker.kill()  # a core that loads holds nothing that is worth waiting for
            await worker.close()
            raise

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._worker.pid

    async def close(self) -> None:
        self._pump.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._pump
        self._die("the engine was closed")
        await self._worker.close()

    async def kill(self, reason: str) -> None:
        """See `engine.face.Engine.kill`."""
        self._die(reason)
        self._worker.kill()
        await self.close()

    def _send(self, command: Command) -> None:
        self._worker.send(command)

    async def _receive(self) -> None:
        """Deliver until the worker is gone or broken; what is left of it ends, so that its memory is free."""
        try:
            reason = await self._deliver_all()
        except EngineDeadError as error:
            reason = str(error)
        except Exception as error:  # ours: whoever waits for events must not wait for ever
            log.exception("the engine's events cannot be delivered")
            reason = f"the engine's events cannot be delivered: {type(error).__name__}"
        self._die(reason)
        await self._worker.close()

    async def _deliver_all(self) -> str:
        """Returns why there is nothing more to deliver."""
        while True:
            match await self._worker.receive():
                case StepOutput() as output:
                    self._deliver(output)
                case Failed(_, message):
                    return message
                case message:
                    return f"the engine sent {type(message).__name__} out of turn"


class Worker:
    """The process, and this side's end of the socket pair."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def spawn(cls) -> Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
            fd = theirs.fileno()
            process = await asyncio.create_subprocess_exec(
                *WORKER,
                f"--fd={fd}",
                pass_fds=[fd],
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal is for the service alone
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: Start | Command) -> None:
        """Never waits: what the socket does not take now is buffered, bounded by the requests in flight."""
        if not self._writer.is_closing():
            self._writer.write(encode(message))

    async def receive(self) -> FromWorker:
        """The next message.

        Raises:
            EngineDeadError: the process is gone, or sent what is no message.
        """
        try:
            header = await self._reader.readexactly(HEADER_BYTES)
            return decode_from_worker(await self._reader.readexactly(body_length(header)))
        except (asyncio.IncompleteReadError, OSError):
            raise EngineDeadError(f"the engine process is gone ({await self._exit_status()})") from None
        except msgspec.DecodeError as error:
            raise EngineDeadError(f"the engine process sent what is no message: {error}") from None

    async def close(self) -> None:
        """Closing the socket ends the worker; one that does not end in time is killed."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        if await self._wait(EXIT_SECONDS) is None:
            self.kill()
            await self._wait(EXIT_SECONDS)

    def kill(self) -> None:
        """Now, even if it is stopped or deep in a step, and with it the processes of the other ranks: they are of its
        session. Not once it is gone, when its number may be another's."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def _exit_status(self) -> str:
        code = await self._wait(0.5)
        if code is None:
            return "its socket is closed"
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    async def _wait(self, seconds: float) -> int | None:
        """Exit code of the process, None if it still runs after so many seconds."""
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(self._process.wait(), seconds)
        return None
