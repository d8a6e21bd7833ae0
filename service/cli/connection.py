"""A server as the commands that talk to one reach it: its gRPC port, with a key and over TLS where it wants them."""

from __future__ import annotations

from pathlib import Path

import grpc


def channel_to(address: str, tls_ca: Path | None) -> grpc.aio.Channel:
    """A channel to HOST:PORT.

    Args:
        tls_ca: PEM file of the CA that vouches for the server's certificate; None = it does not encrypt.

    Raises:
        OSError: the file cannot be read.
    """
    if tls_ca is None:
        return grpc.aio.insecure_channel(address)
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(tls_ca.read_bytes()))


def metadata_with(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """What every call brings."""
    return () if api_key is None else (("authorization", f"Bearer {api_key}"),)
