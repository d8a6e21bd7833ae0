"""The one address of several servers, as a cluster gives to a Service: each new connection goes to an endpoint, and
stays there however endpoints change."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# What clients of a Service should set: see docs/lifecycle.md
SERVICE_CONFIG = Path(__file__).resolve().parents[1] / "proto" / "nemoserve" / "v1" / "service_config.json"


class ServiceAddress:
    """Attributes:
    endpoint: HOST:PORT that the next connections go to.
    connections: that have been made to each.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.connections: list[str] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._open = [self._listening]
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # wakes up who waits for it
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            endpoint = self.endpoint
            self.connections.append(endpoint)
            host, _, port = endpoint.rpartition(":")
            server = socket.create_connection((host, int(port)))
            self._open += (client, server)
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=_pass_on, args=(source, target), daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@contextmanager
def service_address(endpoint: str) -> Iterator[ServiceAddress]:
    service = ServiceAddress(endpoint)
    try:
        yield service
    finally:
        service.close()
