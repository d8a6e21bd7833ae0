"""The HTTP ports of the operator."""

from __future__ import annotations

from starlette.types import ASGIApp

from autoscaler.activator.settings import TlsFiles
from autoscaler.activator.tls import ServerContext
from process.http_port import HttpPort

HEAD_BYTES = 16 * 2**10


def port_for(app: ASGIApp, tls: TlsFiles | None = None) -> HttpPort:
    return HttpPort(app, max_head_bytes=HEAD_BYTES, tls=None if tls is None else ServerContext(tls).context)
