"""How an API server refuses: a `Status` object, with the words that kube-apiserver uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Json = dict[str, Any]


class ApiError(Exception):
    def __init__(
        self, code: int, reason: str, message: str, *, retry_after: int | None = None, causes: Sequence[Json] = ()
    ) -> None:
        super().__init__(message)
        self.code, self.reason, self.message, self.retry_after = code, reason, message, retry_after
        self.causes = list(causes)

    def status(self) -> Json:
        details: Json = {"causes": self.causes} if self.causes else {}
        if self.retry_after is not None:
            details["retryAfterSeconds"] = self.retry_after
        head = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
        return head | {"message": self.message, "reason": self.reason, "details": details, "code": self.code}


def bad_request(message: str) -> ApiError:
    return ApiError(400, "BadRequest", message)


def no_such_resource() -> ApiError:
    return ApiError(404, "NotFound", "the server could not find the requested resource")


def not_found(qualified: str, name: str) -> ApiError:
    return ApiError(404, "NotFound", f'{qualified} "{name}" not found')


def already_exists(qualified: str, name: str) -> ApiError:
    return ApiError(409, "AlreadyExists", f'{qualified} "{name}" already exists')


def conflict(qualified: str, name: str, why: str) -> ApiError:
    return ApiError(409, "Conflict", f'Operation cannot be fulfilled on {qualified} "{name}": {why}')


STALE = "the object has been modified; please apply your changes to the latest version and try again"


def invalid(kind: str, name: str, faults: Sequence[tuple[str, str]]) -> ApiError:
    """Faults: (field, what is wrong with it)."""
    words = [f"{field}: {what}" for field, what in faults]
    text = words[0] if len(words) == 1 else f"[{', '.join(words)}]"
    causes = [{"reason": "FieldValueInvalid", "field": field, "message": what} for field, what in faults]
    return ApiError(422, "Invalid", f'{kind} "{name}" is invalid: {text}', causes=causes)


def expired(asked: int, oldest: int) -> ApiError:
    return ApiError(410, "Expired", f"too old resource version: {asked} ({oldest})")


def too_large(asked: int, current: int) -> ApiError:
    return ApiError(504, "Timeout", f"Too large resource version: {asked}, current: {current}", retry_after=1)
