"""A real server process for tests: `nemoserve serve` as a user starts it, on free loopback ports."""

from __future__ import annotations

import queue
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

NEMOSERVE = Path(sys.executable).parent / "nemoserve"
READY_SECONDS = 90


@dataclass
class ServerProcess:
    """A running `nemoserve serve`; `lines` is what it has printed so far, stdout and stderr together."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    address: str = ""
    http_address: str = ""

    @classmethod
    def start(cls, *args: str | Path, command: Path = NEMOSERVE) -> Self:
        process = subprocess.Popen(
            [str(command), "serve", *map(str, args), "--grpc-port", "0", "--http-port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        server = cls(process)
        fresh: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=server._read, args=(fresh,), daemon=True).start()
        limit = time.monotonic() + READY_SECONDS
        while not server.address:
            line = fresh.get(timeout=max(0.0, limit - time.monotonic()))
            assert line is not None, "the server ended before it was ready:\n" + "".join(server.lines)
            if found := re.search(r"ready at (127\.0\.0\.1:\d+) \(gRPC\) and https?://(127\.0\.0\.1:\d+)/v1", line):
                server.address, server.http_address = found[1], found[2]
        return server

    def _read(self, fresh: queue.SimpleQueue[str | None]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            fresh.put(line)
        fresh.put(None)

    def stop(self, seconds: float = 30.0) -> int:
        """SIGTERM, then the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def kill(self) -> None:
        if code := self.process.poll():
            print(f"the server had ended with {code}:", *self.lines[-20:], sep="\n")
        elif code is None:
            self.process.kill()
            self.process.wait(10)
