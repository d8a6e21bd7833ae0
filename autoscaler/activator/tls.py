"""Certificates of our ports and of replicas. Renewed files are taken at the next handshake, without a restart."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import grpc

from autoscaler.activator.settings import TlsFiles

Version = tuple[tuple[int, int], ...]


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Of a gRPC port.

    Raises:
        OSError: a file cannot be read.
    """
    seen = _versions(files)

    def renewed() -> Any:
        """Called by gRPC before each handshake; None: nothing new."""
        nonlocal seen
        try:
            if (versions := _versions(files)) == seen:
                return None
            configuration = _configuration(files)
        except OSError:  # being written: the next handshake looks again
            return None
        seen = versions
        return configuration

    return grpc.dynamic_ssl_server_credentials(_configuration(files), renewed, False)


def channel_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    """Of a gRPC channel to a replica."""
    return grpc.ssl_channel_credentials(files.ca.read_bytes())


class ServerContext:
    """Of an HTTP port. Each handshake begins with `context`, and goes on with the files as they are then.

    Raises:
        OSError: the files cannot be read, or are no certificate and its key (ssl.SSLError is one).
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._seen = _versions(files)
        self._newest = _context(files)
        self.context = _context(files)
        self.context.sni_callback = self._renew

    def _renew(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        try:
            if (versions := _versions(self._files)) != self._seen:
                self._newest, self._seen = _context(self._files), versions
        except OSError:
            pass  # as above
        connection.context = self._newest


class ClientContext:
    """Of HTTP connections to replicas. The name is checked by who connects.

    Raises:
        OSError: the authorities cannot be read.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._ca, self._seen = files.ca, _version(files.ca)
        self.context = ssl.create_default_context(cafile=files.ca)

    def renew(self) -> None:
        """Before a request: authorities that are new are believed too; those before them until the process ends."""
        try:
            if (version := _version(self._ca)) != self._seen:
                self.context.load_verify_locations(self._ca)
                self._seen = version
        except OSError:  # as above
            pass


def _context(files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(files.certificate, files.key)
    return context


def _configuration(files: TlsFiles) -> Any:
    return grpc.ssl_server_certificate_configuration([(files.key.read_bytes(), files.certificate.read_bytes())])


def _versions(files: TlsFiles) -> Version:
    return tuple(_version(path) for path in (files.certificate, files.key))


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_ino
