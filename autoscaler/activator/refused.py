"""How a request ends that no replica answers. The ports put it into their own words, once each."""

from __future__ import annotations

import enum


class Reason(enum.StrEnum):
    """Why a request ends here; counted by these names."""

    FULL = "full"
    DEADLINE = "deadline"  # the client's own
    TIMEOUT = "timeout"  # `hold_seconds`
    LOST = "lost"
    CLOSING = "closing"


class Gone(Exception):
    """The client has gone, and nobody is there to be told anything."""


class Refused(Exception):
    """A request ends without an answer of a replica.

    Attributes:
        retry_after: seconds; None: coming again will not help.
    """

    def __init__(self, reason: Reason, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.reason, self.message, self.retry_after = reason, message, retry_after
