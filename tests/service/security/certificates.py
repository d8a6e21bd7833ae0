"""Certificates for tests, made by the `openssl` program: an authority, and what it signs."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

_CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def _openssl(*args: str | Path) -> None:
    subprocess.run(["openssl", *map(str, args)], check=True, capture_output=True, timeout=60)


@dataclass(frozen=True)
class Signed:
    """A certificate and its key, in PEM files."""

    certificate: Path
    key: Path

    def copy_to(self, other: Signed) -> None:
        """Take the place of the other, whole file by whole file."""
        for mine, its in ((self.certificate, other.certificate), (self.key, other.key)):
            fresh = its.with_suffix(".fresh")
            fresh.write_bytes(mine.read_bytes())
            fresh.replace(its)


class Authority:
    """Signs certificates in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.path, self._key = folder / "ca.pem", folder / "ca.key"
        _openssl("req", "-x509", *_CURVE, "-keyout", self._key, "-out", self.path, "-days", "2", "-subj", "/CN=tests")

    def server(self, file: str = "server", days: int = 2) -> Signed:
        """For this machine's own addresses; `days` below 0: it has ended."""
        return self._sign(file, "/CN=localhost", "serverAuth", "DNS:localhost,IP:127.0.0.1", days)

    def client(self, subject: str, alternative: str = "", file: str = "client") -> Signed:
        """`subject` as /CN=name."""
        return self._sign(file, subject, "clientAuth", alternative, 2)

    def _sign(self, file: str, subject: str, usage: str, alternative: str, days: int) -> Signed:
        certificate, key = self._folder / f"{file}.pem", self._folder / f"{file}.key"
        request, extensions = self._folder / f"{file}.csr", self._folder / f"{file}.ext"
        names = f"subjectAltName={alternative}\n" if alternative else ""
        extensions.write_text(f"basicConstraints=CA:FALSE\nextendedKeyUsage={usage}\n{names}")
        _openssl("req", *_CURVE, "-keyout", key, "-out", request, "-subj", subject)
        _openssl(
            *("x509", "-req", "-in", request, "-CA", self.path, "-CAkey", self._key, "-CAcreateserial"),
            *("-days", str(days), "-extfile", extensions, "-out", certificate),
        )
        return Signed(certificate, key)
