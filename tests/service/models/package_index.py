"""A package index on loopback that holds one wheel, and breaks connections as told."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from service.models import family
from service.models.catalog import CatalogEntry, WheelFile

PAYLOAD = bytes(range(256)) * 4000
ENDLESS_MEGABYTES = 64


@dataclass
class Index:
    """
    Attributes:
        cuts: after how many bytes each of the next responses breaks off.
        holds: after how many bytes each of the next responses waits for `go`.
        sent: the first byte of each response for the wheel.
        trouble: statuses that answer the next requests for the wheel.
    """

    wheel: bytes
    cuts: list[int] = field(default_factory=list)
    holds: list[int] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)
    changed: threading.Condition = field(default_factory=threading.Condition)
    sent: list[int] = field(default_factory=list)
    trouble: list[int] = field(default_factory=list)
    ranges: bool = True
    endless: bool = False
    endless_megabytes: int = 0  # written so far
    url: str = ""

    def handler(index) -> type[http.server.BaseHTTPRequestHandler]:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/simple/toy/":
                    body = json.dumps({"files": [{"filename": "toy-1-py3-none-any.whl", "url": "/toy.whl"}]}).encode()
                    self.reply(200, body)
                elif self.path == "/toy.whl":
                    self.send_wheel()
                else:
                    self.reply(404, b"")

            def send_wheel(self) -> None:
                if index.trouble:
                    self.reply(index.trouble.pop(0), b"")
                    return
                if index.endless:
                    self.send_endlessly()
                    return
                asked = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-")
                start = int(asked) if index.ranges else 0
                with index.changed:
                    index.sent.append(start)
                    index.changed.notify_all()
                body = index.wheel[start:]
                if index.holds:
                    self.hold(start, body, index.holds.pop(0))
                    return
                cut = index.cuts.pop(0) if index.cuts else len(body)
                self.reply(206 if start else 200, body, cut)

            def hold(self, start: int, body: bytes, count: int) -> None:
                with suppress(ConnectionError):
                    self.reply(206 if start else 200, body, count)
                    index.go.wait()
                    self.wfile.write(body[count:])

            def send_endlessly(self) -> None:
                self.send_response(200)
                self.end_headers()
                with suppress(ConnectionError):
                    while index.endless_megabytes < ENDLESS_MEGABYTES:
                        self.wfile.write(bytes(2**20))
                        index.endless_megabytes += 1

            def reply(self, code: int, body: bytes, cut: int | None = None) -> None:
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:cut])

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@contextmanager
def serving() -> Iterator[Index]:
    """An index until the context ends."""
    made = Index(wheel())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), made.handler()) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        made.url = f"http://127.0.0.1:{server.server_port}/simple"
        yield made
        made.go.set()
        server.shutdown()
        thread.join()


def wheel() -> bytes:
    """The same bytes in every process."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (
            ("toy/model.gguf", PAYLOAD),
            ("toy/__init__.py", b"raise SystemExit('a wheel was imported')"),
        ):
            archive.writestr(zipfile.ZipInfo(name), content)
    return packed.getvalue()


def toy() -> CatalogEntry:
    """The catalogue's entry for it."""
    content = wheel()
    source = WheelFile(
        project="toy",
        filename="toy-1-py3-none-any.whl",
        sha256=hashlib.sha256(content).hexdigest(),
        num_bytes=len(content),
        member="toy/model.gguf",
        member_sha256=hashlib.sha256(PAYLOAD).hexdigest(),
        member_bytes=len(PAYLOAD),
    )
    return CatalogEntry(name="toy", source=source, shape=family.SMOLLM2_135M, licence="MIT")
