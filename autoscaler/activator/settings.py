"""What the owner of an activator chooses, each default with its reason. Durations are seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldLimits:
    """How much is here while there is no replica, or from before there was one, and how long it waits.

    Raises:
        ValueError: names the field, its value and the limit.
    """

    # That wait or are being answered; and streams that watch health or load. Four batches of a server of 256 rows:
    # what comes later is better told at once to come again.
    max_requests: int = 1024
    # 64 KiB for each of those, 16,000 tokens of text; and four of the largest that a server takes.
    max_bytes: int = 64 * 2**20
    # What a server takes: `--max-request-bytes`
    max_request_bytes: int = 16 * 2**20
    # As long as OpenAI's clients wait. Starts take 30 to 300 s; nodes that must be made first, minutes more.
    hold_seconds: float = 600.0
    # A stream over HTTP that has been held so long begins with comments; None: never, whatever its status is.
    comment_after_seconds: float | None = 1.0

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_bytes", "max_request_bytes"):
            if (count := getattr(self, name)) < 1:
                raise ValueError(f"{name}: {count} must be at least 1")
        if not self.hold_seconds > 0:
            raise ValueError(f"hold_seconds: {self.hold_seconds:g} must be more than 0")
        if self.comment_after_seconds is not None and not self.comment_after_seconds >= 0:
            raise ValueError(f"comment_after_seconds: {self.comment_after_seconds:g} must be at least 0")

    @property
    def largest_request(self) -> int:
        """Bytes; what is larger will never fit."""
        return min(self.max_request_bytes, self.max_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files, for servers whose ports have TLS: the same certificate as theirs serves our ports.

    Attributes:
        ca: what the certificates of replicas are verified by.
        server_name: which they must be for: replicas are reached by address, and no certificate names that.
    """

    certificate: Path
    key: Path
    ca: Path
    server_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivatorSettings:
    """`HOST:PORT` to listen on, port 0 for any free one."""

    grpc_address: str = "0.0.0.0:8001"
    http_address: str = "0.0.0.0:8000"
    limits: HoldLimits = field(default_factory=HoldLimits)
    tls: TlsFiles | None = None
