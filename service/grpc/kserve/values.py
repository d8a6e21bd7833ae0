"""Values that clients send in whatever type is at hand (JSON text, tensors, request parameters) to the type we need.

Every refusal names the field, the value and what would do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from service.errors import invalid
from service.grpc.kserve.model import Array
from service.security.limits import MAX_JSON_VALUES, has_too_many_values
from service.text.chat import Conversation, Message
from service.text.check import check_counts

INT32 = 2**31
SHOWN = 80  # characters of a wrong value in a message


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def utf8(field: str, value: bytes) -> str:
    """Text of a BYTES element."""
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise invalid(field, f"is not valid UTF-8: byte {value[error.start]:#04x} at {error.start}") from None


def integer(field: str, value: object) -> int:
    """An int of 32 bits from a number or its decimal text."""
    return _integer(field, value, -INT32, INT32 - 1)


def seed(field: str, value: object) -> int:
    return _integer(field, value, 0, 2**64 - 1)


def _integer(field: str, value: object, low: int, high: int) -> int:
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        number = int(value)
        if isinstance(value, float) and number != value:
            raise ValueError
    except (ValueError, OverflowError):
        raise invalid(field, f"{shown(value)} must be an integer") from None
    if not low <= number <= high:
        raise invalid(field, f"{shown(number)} must be between {low} and {high}")
    return number


def number(field: str, value: object) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        return float(value)
    except (ValueError, OverflowError):
        raise invalid(field, f"{shown(value)} must be a number") from None


def boolean(field: str, value: object) -> bool:
    """A bool; the texts true and false in any case, and 0 and 1, will do."""
    known = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(value, bool):
        return value
    if (found := known.get(str(value).lower())) is not None:
        return found
    raise invalid(field, f"{shown(value)} must be true or false")


def text(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise invalid(field, f"{shown(value)} must be a string")
    return value


def strings(field: str, value: object) -> tuple[str, ...]:
    """A string, or a list of strings."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise invalid(field, f"{shown(value)} must be a string or a list of strings")
    return tuple(values)


def integers(field: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise invalid(field, f"{shown(value)} must be a list of integers")
    return tuple(integer(f"{field}[{index}]", item) for index, item in enumerate(value))


def biases(field: str, value: object) -> dict[int, float]:
    """Token id to bias; JSON keys are texts."""
    if not isinstance(value, dict):
        raise invalid(field, f"{shown(value)} must be an object of token ids and numbers")
    return {integer(field, token): number(f"{field}[{token}]", bias) for token, bias in value.items()}


def json_value(field: str, text: str) -> Any:
    if has_too_many_values(text):
        raise invalid(field, f"has more than {MAX_JSON_VALUES} values, by its commas and brackets")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise invalid(field, f"is not valid JSON: {reason}") from None


def conversation(field: str, text: str) -> Conversation:
    """A chat from a JSON list of {"role": …, "content": …}."""
    turns = json_value(field, text)
    if not isinstance(turns, list) or not turns:
        raise invalid(field, f"{shown(turns)} must be a list of at least one object with role and content")
    check_counts(messages=len(turns), calls=0, tools=0)
    messages = []
    for index, turn in enumerate(turns):
        where = f"{field}[{index}]"
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise invalid(where, f"{shown(turn)} must be an object with the strings role and content")
        if extra := sorted(turn.keys() - {"role", "content"}):
            raise invalid(f"{where}.{extra[0]}", "is not served; a message has role and content")
        messages.append(Message(role=turn["role"], content=turn["content"]))
    return Conversation(messages=tuple(messages))


class Inputs:
    """Reads the tensors of one request, each as one value or as a list."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = arrays

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def all(self, name: str) -> list[Any]:
        """Elements as Python values: BYTES as text, FP32 by their shortest decimal; empty if the tensor is absent.

        Raises:
            ServiceError: INVALID_ARGUMENT for BYTES that are not UTF-8.
        """
        if name not in self._arrays:
            return []
        flat = self._arrays[name].reshape(-1)
        if flat.dtype == object:
            return [utf8(name, element) for element in flat]
        if flat.dtype.kind == "f":
            return [float(str(element)) for element in flat]
        return list(flat.tolist())

    def one(self, name: str, default: Any = None) -> Any:
        """The element of a tensor of one, `default` if the tensor is absent."""
        return next(iter(self.all(name)), default)


Convert = Callable[[str, object], Any]
