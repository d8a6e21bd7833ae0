"""With what the operator shows replicas who it is, and knows them: key and certificates, from files that may change."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

import grpc

MAX_BYTES = 1 << 20  # of a file
Shown = tuple[str, bytes | None, bytes | None, bytes | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Secrets:
    """Files, as Kubernetes mounts them; None: there is none of the kind.

    Attributes:
        api_key: any key that the servers know; no admin's is needed (docs/security.md).
        api_key_text: the same, where it is in no file and never changes.
        ca: authorities that sign the servers' certificates. With it the connections are encrypted.
        certificate, key: of the operator, where servers ask for it (mTLS).
        server_name: that the servers' certificates have; the operator connects to addresses of pods, which they cannot
            have. Needed with `ca`.
    """

    api_key: Path | None = None
    api_key_text: str = field(default="", repr=False)
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    server_name: str = ""

    def __post_init__(self) -> None:
        if self.ca is None and (self.certificate is not None or self.server_name):
            raise ValueError("a certificate or a server name is given, and no file of authorities (ca)")
        if self.ca is not None and not self.server_name:
            raise ValueError("server_name is missing: the name that the servers' certificate has")
        if (self.certificate is None) != (self.key is None):
            raise ValueError("a certificate and its key go together")

    def read(self) -> Opened:
        """As they are now.

        Raises:
            OSError, ValueError: a file cannot be read, or is none.
        """
        key = self.api_key_text if self.api_key is None else _read(self.api_key).decode().strip()
        if not (key.isascii() and (key.isprintable() or not key)):
            raise ValueError(f"{self.api_key or 'the API key'} is not one line of ASCII")
        found = (None if path is None else _read(path) for path in (self.ca, self.key, self.certificate))
        return Opened(self, key, *found)


@dataclass(frozen=True, slots=True)
class Opened:
    """Secrets as they were read. Equal if nothing has changed since."""

    files: Secrets
    api_key: str = field(repr=False)
    ca: bytes | None
    key: bytes | None = field(repr=False)
    certificate: bytes | None

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    def channel(self, target: str, options: list[tuple[str, str | int]]) -> grpc.aio.Channel:
        if self.ca is None:
            return grpc.aio.insecure_channel(target, options)
        credentials = grpc.ssl_channel_credentials(self.ca, self.key, self.certificate)
        return grpc.aio.secure_channel(
            target, credentials, [*options, ("grpc.ssl_target_name_override", self.files.server_name)]
        )

    def tls(self) -> ssl.SSLContext | None:
        """Of HTTP. Raises OSError, ssl.SSLError."""
        if self.ca is None:
            return None
        context = ssl.create_default_context(cadata=self.ca.decode())
        if self.files.certificate is not None:
            context.load_cert_chain(self.files.certificate, self.files.key)
        return context


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES} bytes")
    return content
