"""Bodies of requests: read within limits of size and time, decoded into typed structs, refused by path and value."""

from __future__ import annotations

import asyncio
import difflib
import re
from collections.abc import Iterable
from typing import TypeVar

import msgspec
from starlette.requests import Request

from service.errors import ServiceError, invalid
from service.http.errors import RouteError
from service.security.limits import MAX_JSON_VALUES, has_too_many_values

BODY_SECONDS = 60.0  # for a whole body to arrive; the largest one over 5 Mbit/s
SHOWN = 64  # characters of a value that an error quotes
T = TypeVar("T")
_PATH = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")
_MISSING = re.compile(r"Object missing required field `([^`]*)`")


async def read(request: Request, kind: type[T], max_bytes: int) -> T:
    """The JSON body as a value of this type; see `read_bytes` and `decode`."""
    return decode(await read_bytes(request, max_bytes), kind)


async def read_bytes(request: Request, max_bytes: int) -> bytes:
    """The body as it came.

    Raises:
        ServiceError: INVALID_ARGUMENT, it does not say that it is JSON.
        RouteError: it is too large, or takes too long.
    """
    content_type = request.headers.get("content-type", "")
    # Also what keeps pages of other sites from sending requests: a browser asks before it sends JSON.
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise invalid("content-type", f"{_quoted(content_type)} must be application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise invalid("content-encoding", "bodies must not be compressed")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _read(request, max_bytes)
    except TimeoutError:
        message = f"the body did not arrive within {BODY_SECONDS:.0f} seconds"
        raise RouteError(408, "timeout", message, {"connection": "close"}) from None


async def _read(request: Request, max_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "0")
    too_large = RouteError(413, "body_too_large", f"the body has more than {max_bytes} bytes")
    if int(declared) > max_bytes:  # the HTTP parser lets digits pass alone
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            raise too_large
    return b"".join(parts)


def decode(data: bytes, kind: type[T], name: str = "body") -> T:
    """JSON text as a value of this type; errors name path, value and what was expected.

    Args:
        name: of the whole text, in errors.

    Raises:
        ServiceError: INVALID_ARGUMENT.
    """
    if has_too_many_values(data):
        raise invalid(name, f"has more than {MAX_JSON_VALUES} values, by its commas and brackets")
    try:
        data.decode()  # msgspec does not look at the text of what it skips or keeps as it is
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise _explained(error, data, name) from None
    except RecursionError:
        raise invalid(name, "is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        reason = "not valid UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise invalid(name, f"must be JSON: {reason}") from None


def _explained(error: msgspec.ValidationError, data: bytes, name: str) -> ServiceError:
    text = str(error)
    path = found[1] if (found := _PATH.search(text)) else ""
    text = _PATH.sub("", text)
    if missing := _MISSING.fullmatch(text):
        return invalid(f"{path}.{missing[1]}" if path else missing[1], "is missing")
    return invalid(path or name, f"{text[:1].lower()}{text[1:]}{_shown(data, path)}")


def meant(field: str, names: Iterable[str]) -> str:
    """A hint for a name that is not among these, if one is close."""
    close = difflib.get_close_matches(field[:SHOWN], names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _shown(data: bytes, path: str) -> str:
    """The value at a path, if it is there and no list or object."""
    if not path:
        return ""
    try:
        value = msgspec.json.decode(data)
        for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
            value = value[int(index)] if index else value[key]
        return f", which is {_quoted(value)}" if value is None or isinstance(value, str | int | float) else ""
    except (LookupError, TypeError, ValueError, RecursionError):
        return ""


def _quoted(value: object) -> str:
    if isinstance(value, str):
        value = value[: SHOWN + 1]
        return repr(value if len(value) <= SHOWN else value[:SHOWN] + "…")
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
