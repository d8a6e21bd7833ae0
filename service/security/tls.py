"""Certificates of both ports: checked at the start, and taken anew when their files change, without a restart.

Files are checked by use: the certificate shakes hands with a client in memory that trusts nothing but it, which finds
out whether key and certificate belong together, whether it is time to use them, and whether they are a server's at all.
What does not pass at the start ends it; later the ports keep what they have, and say so once.

    watch: files changed? ─► read and check them ─► gRPC: asks for the newest at every new connection
                                                └─► HTTP: every handshake is given the newest context
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from service.security.errors import SecurityError
from service.security.exposure import asks_for_certificates, encrypts
from service.security.files import Version, read_file, version_of

log = logging.getLogger(__name__)

RELOAD_SECONDS = 10.0  # certificates are renewed days before their end
SOON_DAYS = 14  # before its end a certificate is warned of at every start and renewal


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files. `certificate` has the whole chain, the server's own first; `client_ca` None = clients need none."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.certificate, self.key) if self.client_ca is None else (self.certificate, self.key, self.client_ca)


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    """What was in the files when they were good, and until when (Unix time) the server's own may be used."""

    chain: bytes
    key: bytes
    client_ca: bytes | None
    context: ssl.SSLContext
    expires: float


class Tls:
    """The newest good certificates.

    Raises:
        SecurityError: the files cannot be used.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._seen = _versions(files)
        self._current = read_certificates(files)
        self._given_to_grpc = self._current
        # Handshakes begin with this context and go on with the newest; it must ask for client certificates itself.
        self.context = read_certificates(files).context
        self.context.sni_callback = self._newest
        self._tell("TLS")

    @property
    def client_certificates(self) -> bool:
        """Whether each client has to show one."""
        return self._files.client_ca is not None

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Of a port that takes renewed certificates for its new connections."""
        current = _grpc_configuration(self._current)
        return grpc.dynamic_ssl_server_credentials(current, self._renewed, self.client_certificates)

    def refresh(self) -> None:
        """Read the files again if they are others than last time."""
        if (versions := _versions(self._files)) == self._seen:
            return
        try:
            current = read_certificates(self._files)
        except SecurityError as error:
            log.error("certificates stay as they were", extra={"reason": str(error)})
        else:
            if _versions(self._files) != versions:
                return  # they are being written: the next look finds them whole
            self._current = current
            self._tell("certificates read again")
        self._seen = versions

    async def watch(self) -> None:
        """Refresh every RELOAD_SECONDS, in a thread: files are read and numbers are crunched."""
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            await asyncio.to_thread(self.refresh)

    def _tell(self, event: str) -> None:
        days = (self._current.expires - time.time()) / 86400
        level = logging.WARNING if days < SOON_DAYS else logging.INFO
        log.log(level, event, extra={"certificate": str(self._files.certificate), "days_left": int(days)})

    def _renewed(self) -> Any:
        """Called by gRPC in a thread of its own before each handshake; None = nothing new."""
        current = self._current
        if current is self._given_to_grpc:
            return None
        self._given_to_grpc = current
        return _grpc_configuration(current)

    def _newest(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        """Called by OpenSSL in each handshake, also if the client names no server."""
        connection.context = self._current.context


def tls_of(values: Mapping[str, Any]) -> Tls | None:
    """The certificates of both ports, None = they are in plain text.

    Raises:
        SecurityError: the files cannot be used.
    """
    files = tls_files(values)
    return None if files is None else Tls(files)


def tls_files(values: Mapping[str, Any]) -> TlsFiles | None:
    """Those that the settings name."""
    if not encrypts(values):
        return None
    client_ca = Path(values["tls_client_ca"]) if asks_for_certificates(values) else None
    return TlsFiles(certificate=Path(values["tls_cert"]), key=Path(values["tls_key"]), client_ca=client_ca)


def read_certificates(files: TlsFiles) -> Certificates:
    """Raises SecurityError."""
    chain, key = read_file(files.certificate), read_file(files.key)
    client_ca = None if files.client_ca is None else read_file(files.client_ca)
    for path, data in ((files.certificate, chain), (files.client_ca, client_ca)):
        if data is not None and b"-----BEGIN CERTIFICATE-----" not in data:
            raise SecurityError(f"{path}: holds no certificate in PEM form")
    if b"PRIVATE KEY-----" not in key:
        raise SecurityError(f"{files.key}: holds no private key in PEM form")
    if b"ENCRYPTED" in key:
        raise SecurityError(f"{files.key}: is encrypted, and nobody is there to type its password")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    with _named(files.certificate):
        try:
            context.load_cert_chain(files.certificate, files.key)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise SecurityError(f"{files.key}: is not the key of {files.certificate}") from None
            raise
        own = _try(context, chain)
    if client_ca is not None:
        assert files.client_ca is not None
        with _named(files.client_ca):
            context.load_verify_locations(cadata=client_ca.decode("ascii", "ignore"))
            context.verify_mode = ssl.CERT_REQUIRED
            # A session that goes on is not verified again, not even by another CA: each connection begins its own.
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.num_tickets = 0
        if all(_ended(each) for each in context.get_ca_certs()):
            raise SecurityError(f"{files.client_ca}: holds no CA certificate that may be used now")
    return Certificates(
        chain=chain, key=key, client_ca=client_ca, context=context, expires=ssl.cert_time_to_seconds(own["notAfter"])
    )


def certificate_name(common_names: Sequence[str], alternative_names: Sequence[str]) -> str | None:
    """Who a client certificate is of: its common name, or else the first of its alternative names."""
    return next((name for name in (*common_names, *alternative_names) if name), None)


def _try(context: ssl.SSLContext, chain: bytes) -> Mapping[str, Any]:
    """Shake hands with a client that trusts the chain alone. Returns the server's own certificate as the client saw it.

    Raises:
        ssl.SSLError: the client would not go on, and why.
    """
    judge = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    judge.check_hostname = False  # clients know by which name they have come
    judge.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the CA above the chain need not be here
    judge.load_verify_locations(cadata=chain.decode("ascii", "ignore"))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = judge.wrap_bio(to_client, to_server)
    server = context.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client, server):
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()
    seen = client.getpeercert()
    assert seen is not None
    return seen


def _ended(certificate: Mapping[str, Any]) -> bool:
    return ssl.cert_time_to_seconds(certificate["notAfter"]) < time.time()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What OpenSSL says against the certificates of this file."""
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise SecurityError(f"{path}: {error.verify_message}") from None
    except ssl.SSLError as error:
        reason = (error.reason or "unknown reason").lower().replace("_", " ")
        raise SecurityError(f"{path}: cannot be used: {reason}") from None


def _grpc_configuration(current: Certificates) -> Any:
    return grpc.ssl_server_certificate_configuration([(current.key, current.chain)], current.client_ca)


def _versions(files: TlsFiles) -> tuple[Version, ...]:
    return tuple(version_of(path) for path in files.paths)
