"""How the text of a setting becomes its value: one function per kind, the same for flags, variables and files.

Each raises ValueError with what the value must be, and nothing else; who calls says whose value it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from service.models.profiles import settings_of

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
LEAST_MEMORY = 4096  # bytes; what is smaller was meant as something else, such as a percentage
_LEVELS = {"trace": "debug", "default": "info", "warn": "warning", "critical": "error"}  # NIM's -> ours


def text(value: str) -> str:
    if not value:
        raise ValueError("must not be empty")
    return value


def names(value: str) -> tuple[str, ...]:
    """NIM's form of several: separated by commas, the first is the one that answers bear."""
    found = tuple(name.strip() for name in value.split(","))
    if not all(found):
        raise ValueError("must be a name, or several separated by commas")
    if len(set(found)) < len(found):
        raise ValueError("must not have a name twice")
    return found


def count(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            raise ValueError("must be a whole number") from None
        if not low <= number <= high:
            raise ValueError(f"must be between {low} and {high}")
        return number

    return parse


def port_or_off(value: str) -> int | None:
    if value == "off":
        return None
    try:
        return count(0, 65535)(value)
    except ValueError as error:
        raise ValueError(f"{error}, or off") from None


def seconds(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ValueError("must be a number of seconds") from None
    if not 0 <= number <= 86400:
        raise ValueError("must be between 0 and 86400 seconds")
    return number


def patience(value: str) -> float:
    """Seconds for which somebody is waited for."""
    if (number := seconds(value)) < 1:
        raise ValueError("must be at least 1 second")
    return number


def size(value: str) -> int:
    """Bytes."""
    match = re.fullmatch(r"(\d{1,15})([KMG]i?)?B?", value)
    if match is None or int(match[1]) == 0:
        raise ValueError("must be a number of bytes, such as 800M or 4Gi")
    return int(match[1]) * _UNITS[match[2] or ""]


def memory(value: str) -> int | float:
    """Bytes as int, a share of what is left as float."""
    if share := re.fullmatch(r"(\d{1,3}(?:\.\d{1,6})?)%|([01]?\.\d{1,6})", value):
        number = float(share[1]) / 100 if share[1] else float(share[2])
        if not 0 < number <= 1:
            raise ValueError("must be a share above 0 and at most 1.0, which is 100%")
        return number
    try:
        if (number := size(value)) >= LEAST_MEMORY:
            return number
    except ValueError:
        pass
    raise ValueError(
        f"must be a number of bytes, such as 800M or 4Gi and at least {LEAST_MEMORY}, "
        "or a share of what is left, such as 0.9 or 90%"
    )


def url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be a URL such as http://localhost:4317")
    return value


def folder(value: str) -> str:
    path = Path(text(value)).expanduser()
    if not path.is_dir():
        raise ValueError("must be a folder that is there")
    return str(path.absolute())


def file(value: str) -> str:
    path = Path(text(value)).expanduser()
    if not path.is_file():
        raise ValueError("must be a file that is there")
    return str(path.absolute())


def choice(*choices: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return value

    return parse


def level(value: str) -> str:
    """Of log lines; NIM's names for them too, in any case."""
    lower = value.lower()
    return choice("debug", "info", "warning", "error")(_LEVELS.get(lower, lower))


AUTO = "auto"


def profile(value: str) -> str | None:
    """An id, AUTO, or NIM's "default", which is to have none: the file as it is."""
    if value == "default":
        return None
    if value != AUTO:
        settings_of(value)
    return value


def flag(value: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if value.lower() not in words:
        raise ValueError("must be true or false")
    return words[value.lower()]
