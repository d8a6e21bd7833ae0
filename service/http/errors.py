"""ServiceError to an HTTP answer in OpenAI's shape, once for every route.

{"error": {"message": "n: 0 must be …", "type": "invalid_request_error", "param": "n", "code": "invalid_argument"}}
"""

from __future__ import annotations

import math

import msgspec

from service.errors import Code, ServiceError

MAX_MESSAGE = 2048  # characters: errors may quote what a client sent, whatever its size
RETRY_MS = 1000  # where nothing better is known

# code -> status, and OpenAI's name for the family
STATUS = {
    Code.INVALID_ARGUMENT: (400, "invalid_request_error"),
    Code.FAILED_PRECONDITION: (400, "invalid_request_error"),
    Code.UNIMPLEMENTED: (400, "invalid_request_error"),
    Code.UNAUTHENTICATED: (401, "authentication_error"),
    Code.PERMISSION_DENIED: (403, "permission_error"),
    Code.NOT_FOUND: (404, "not_found_error"),
    Code.DEADLINE_EXCEEDED: (408, "timeout_error"),
    Code.RESOURCE_EXHAUSTED: (429, "rate_limit_error"),
    Code.UNAVAILABLE: (503, "server_error"),
    Code.INTERNAL: (500, "server_error"),
}
WORTH_A_RETRY = (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE)


class ErrorInfo(msgspec.Struct, kw_only=True):
    """What went wrong. `param` is the path of the field at fault; `code` is for programs, `message` for people."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct):
    """The body of every answer that is no success, and of the event that ends a stream which cannot go on."""

    error: ErrorInfo


class RouteError(Exception):
    """What is wrong with a request before anything of the service is asked: no such route or method, a body too large
    or too slow."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers or {}


def body_of(error: ServiceError | RouteError) -> ErrorBody:
    if isinstance(error, RouteError):
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        return ErrorBody(ErrorInfo(message=_shortened(error.message), type=kind, param=None, code=error.code))
    _, kind = STATUS[error.code]
    code, message = _in_words_of_clients(error)
    return ErrorBody(ErrorInfo(message=_shortened(message), type=kind, param=error.field, code=code))


def status_of(error: ServiceError | RouteError) -> int:
    return error.status if isinstance(error, RouteError) else STATUS[error.code][0]


def headers_of(error: ServiceError | RouteError) -> dict[str, str]:
    """When to come again, where that makes sense: in whole seconds for everybody, in milliseconds for the official
    client, which otherwise would also repeat what cannot succeed."""
    if isinstance(error, RouteError):
        return error.headers
    if error.code in WORTH_A_RETRY:
        wait = RETRY_MS if error.retry_after_ms is None else error.retry_after_ms
        return {"retry-after": str(max(1, math.ceil(wait / 1000))), "retry-after-ms": str(wait)}
    if error.code is Code.UNAUTHENTICATED:
        return {"www-authenticate": "Bearer"}
    return {"x-should-retry": "false"} if error.code in (Code.DEADLINE_EXCEEDED, Code.INTERNAL) else {}


def _in_words_of_clients(error: ServiceError) -> tuple[str, str]:
    """Code and message. A prompt that is too long has the words that clients look for, to shorten what they send or to
    take another model: OpenAI's code, and the one phrase that both LangChain and LiteLLM know."""
    if error.field not in ("prompt", "messages") or " the context of " not in error.message:
        return error.code.value, error.message
    reason = error.message.removeprefix(f"{error.field}: ")
    return "context_length_exceeded", f"{error.field}: the prompt is too long: {reason}"


def _shortened(message: str) -> str:
    return message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "…"
