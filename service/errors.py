"""What can go wrong in the service, as types with a protocol-neutral code. Adapters map it once, at their edge."""

from __future__ import annotations

import enum

from engine.errors import (
    AdapterNotFoundError,
    EngineConfigError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
)


class Code(enum.StrEnum):
    """Kinds of failure, named as gRPC names them."""

    INVALID_ARGUMENT = "invalid_argument"
    NOT_FOUND = "not_found"
    UNAUTHENTICATED = "unauthenticated"
    PERMISSION_DENIED = "permission_denied"
    FAILED_PRECONDITION = "failed_precondition"
    RESOURCE_EXHAUSTED = "resource_exhausted"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    UNIMPLEMENTED = "unimplemented"
    UNAVAILABLE = "unavailable"
    INTERNAL = "internal"


class ServiceError(Exception):
    """An error that may be shown to a client as it stands.

    Args:
        code: kind of failure.
        message: one sentence; for INVALID_ARGUMENT it names field, value and limit.
        field: the offending field, if one is.
        retry_after_ms: when a retry makes sense, for RESOURCE_EXHAUSTED.
    """

    def __init__(
        self, code: Code, message: str, *, field: str | None = None, retry_after_ms: int | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field
        self.retry_after_ms = retry_after_ms

    def about(self, field: str, message: str | None = None) -> ServiceError:
        """The same error, about a field that the client knows by another name.

        Args:
            message: in other words, if need be.
        """
        if field in ("", self.field):
            return self
        reason = (message or self.message).removeprefix(f"{self.field}: ")
        return ServiceError(self.code, f"{field}: {reason}", field=field, retry_after_ms=self.retry_after_ms)


class EngineLost(ServiceError):
    """UNAVAILABLE, because the engine died while it had the request."""

    def __init__(self) -> None:
        super().__init__(Code.UNAVAILABLE, "the engine is down; retry later")


class TalkError(Exception):
    """A conversation partner cannot answer; the message is one line for the person at the terminal."""


def invalid(field: str, reason: str) -> ServiceError:
    """INVALID_ARGUMENT about `field`; the message reads `field: reason`."""
    return ServiceError(Code.INVALID_ARGUMENT, f"{field}: {reason}", field=field)


def from_engine(error: EngineError) -> ServiceError:
    """The service's view of an engine error."""
    if isinstance(error, InvalidRequestError):
        return ServiceError(Code.INVALID_ARGUMENT, str(error), field=error.field)
    if isinstance(error, AdapterNotFoundError):
        return ServiceError(Code.NOT_FOUND, str(error), field="adapter")
    if isinstance(error, EngineDeadError):
        return EngineLost()
    if isinstance(error, EngineConfigError):
        return ServiceError(Code.UNAVAILABLE, "the engine is not configured to serve this model")
    return ServiceError(Code.INTERNAL, "internal error")
