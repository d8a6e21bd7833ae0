"""A rank that decides nothing: `python -m engine.parallel.follower --fd N`, started by `engine.parallel.leader`.

It runs the plans that it is sent, and ends with the leader: a thread waits for the socket's other end to close, because
the main thread may be inside a sum that will never be complete.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import signal
import socket
import sys
import threading
from pathlib import Path

from engine.errors import EngineError
from engine.parallel.wire import Allowed, Meet, Met, Point, Start, Step, encode, receive_to_follower
from engine.wire import Failed
from process.logs import configure

log = logging.getLogger(__name__)


def follow(sock: socket.socket) -> None:
    """Load this rank's share and run steps until the leader closes the socket."""
    start = receive_to_follower(sock)
    if start is None:
        return
    assert isinstance(start, Start)
    from engine.parallel.communicator import connect, device_of_rank  # torch: seconds of import
    from engine.runner import load_runner

    def meet(point: Point) -> None:
        sock.sendall(encode(Met(point)))
        if receive_to_follower(sock) != Meet(point):
            raise ConnectionError(f"the leader does not come to {point!r}")

    config = start.config
    configure("error", as_json=config.log_json)  # rank 0 says the rest
    device = device_of_rank(config.device, start.rank, config.tensor_parallel_size)
    meet(Point.STARTED)
    communicator = connect(Path(start.store), start.rank, config.tensor_parallel_size, device)
    runner = load_runner(config, lambda phase, done: None, communicator, lambda: meet(Point.LOADED))

    def masks() -> dict[int, bytes]:
        allowed = receive_to_follower(sock)
        if not isinstance(allowed, Allowed):
            raise ConnectionError("the leader has no masks for its step")
        return allowed.masks

    while (message := receive_to_follower(sock)) is not None:
        assert isinstance(message, Step)
        runner.launch(message.plan, masks if message.masked else None)  # what it samples, the leader says


def end_with(sock: socket.socket) -> None:
    """End this process, whatever it is doing, when the other side closes or dies."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)

    def wait() -> None:
        poll.poll()
        os._exit(0)

    threading.Thread(target=wait, name="leader", daemon=True).start()


def main() -> int:
    parser = argparse.ArgumentParser(prog="engine.parallel.follower", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="inherited end of a socket pair")
    configure("error", as_json=False)  # until the leader says how
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the service drains first, and needs all ranks for it
    with socket.socket(fileno=parser.parse_args().fd) as sock:
        end_with(sock)
        try:
            follow(sock)
        except EngineError as error:
            failed = Failed(type(error).__name__, str(error))
        except Exception as error:  # ours or torch's: the leader learns of it before the process ends
            log.exception("the rank failed")
            failed = Failed("", f"it failed: {type(error).__name__}")
        else:
            return 0
        with contextlib.suppress(OSError):
            sock.sendall(encode(failed))
    return 1


if __name__ == "__main__":
    sys.exit(main())
