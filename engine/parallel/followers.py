"""The processes of the other ranks, as rank 0 sees them: started, met, sent to, watched, ended.

Each has a thread here that reads its socket. Where one rank dies, those that wait for it fail as well; the one that is
named is the one that began.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from engine.config import EngineConfig
from engine.errors import EngineDeadError, EngineError, error_of
from engine.parallel.wire import Meet, Met, Point, Start, ToFollower, encode, receive_from_follower
from engine.wire import Failed

# -P: a folder named `engine` where the server is started must not be taken for ours.
FOLLOWER = (sys.executable, "-P", "-m", "engine.parallel.follower")
EXIT_SECONDS = 10.0  # a follower ends at once when its socket closes
CAUSE_SECONDS = 1.0  # until the rank that began is known, where others have failed


class _Loss(NamedTuple):
    """`consequence`: it may have failed only because another did."""

    error: EngineError
    consequence: bool


class Followers:
    """All of them.

    Attributes:
        store: file by which the ranks find one another, in a folder that only this user can enter.
        on_loss: called once, from a thread, when the first is lost.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="nemoserve-ranks-")
        self.store = Path(self._folder.name) / "store"
        self.on_loss: Callable[[], None] = lambda: None
        self._changed = threading.Condition()
        self._met: set[tuple[int, Point]] = set()
        self._lost: dict[int, _Loss] = {}
        self._closing = False
        self._ranks = range(1, config.tensor_parallel_size)
        self._sockets: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []
        try:
            for rank in self._ranks:
                self._start(config, rank)
        except BaseException:
            self.close()
            raise

    def meet(self, point: Point) -> None:
        """Wait until all have come to it, and send them on. Raises the EngineError of one that was lost."""
        with self._changed:
            self._changed.wait_for(lambda: self._lost or all((rank, point) in self._met for rank in self._ranks))
        self.send(Meet(point))

    def send(self, message: ToFollower) -> None:
        """To all. Raises the EngineError of one that was lost."""
        self.check()
        frame = encode(message)
        try:
            for sock in self._sockets:
                sock.sendall(frame)
        except OSError as error:
            self.blame(error)
            raise

    def check(self) -> None:
        """Raises the EngineError of the one that was lost first."""
        if self._lost:
            raise self._cause()

    def blame(self, error: Exception) -> None:
        """Raise the EngineError of the rank that is the cause of an error of this one, if one is."""
        if isinstance(error, EngineError):
            return
        with self._changed:
            self._changed.wait_for(
                lambda: any(not loss.consequence for loss in self._lost.values()), timeout=CAUSE_SECONDS
            )
        if self._lost:
            raise self._cause() from error

    @contextmanager
    def blaming(self) -> Iterator[None]:
        """`blame` whatever is raised within."""
        try:
            yield
        except Exception as error:
            self.blame(error)
            raise

    def close(self) -> None:
        """End all of them and wait for it. Idempotent."""
        self._closing = True
        for sock in self._sockets:
            with sock:
                if sock.fileno() >= 0:
                    sock.shutdown(socket.SHUT_RDWR)
        for process in self._processes:
            try:
                process.wait(EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for thread in self._threads:
            thread.join()
        self._folder.cleanup()

    def _start(self, config: EngineConfig, rank: int) -> None:
        ours, theirs = socket.socketpair()
        self._sockets.append(ours)
        with theirs:
            command = [*FOLLOWER, f"--fd={theirs.fileno()}"]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._processes.append(process)
        thread = threading.Thread(target=self._watch, args=(rank, ours, process), name=f"rank-{rank}", daemon=True)
        self._threads.append(thread)
        thread.start()
        ours.sendall(encode(Start(config, rank, str(self.store))))

    def _watch(self, rank: int, sock: socket.socket, process: subprocess.Popen[bytes]) -> None:
        while True:
            try:
                message = receive_from_follower(sock)
            except (OSError, msgspec.DecodeError) as error:
                return self._lose(rank, EngineDeadError(f"rank {rank} sent what is no message: {error}"), False)
            match message:
                case Met(point):
                    with self._changed:
                        self._met.add((rank, point))
                        self._changed.notify_all()
                case Failed(kind, text):
                    return self._lose(rank, error_of(kind, f"rank {rank}: {text}"), not kind)
                case None:
                    return self._lose(rank, EngineDeadError(f"rank {rank} is gone ({_exit_of(process)})"), False)

    def _lose(self, rank: int, error: EngineError, consequence: bool) -> None:
        if self._closing:
            return
        with self._changed:
            first = not self._lost
            self._lost[rank] = _Loss(error, consequence)
            self._changed.notify_all()
        if first:
            self.on_loss()

    def _cause(self) -> EngineError:
        with self._changed:
            return min(self._lost.values(), key=lambda loss: loss.consequence).error


def _exit_of(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(1.0)
    except subprocess.TimeoutExpired:
        return "its socket is closed"
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
