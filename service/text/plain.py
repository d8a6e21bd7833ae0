"""The one check that every text from outside passes before it is encoded."""

from __future__ import annotations

from service.errors import invalid


def require_utf8(text: str, field: str) -> None:
    """Refuse text that has no UTF-8 form: lone surrogates, as JSON escapes can smuggle them in.

    Raises:
        ServiceError: INVALID_ARGUMENT naming `field` and the first bad position.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise invalid(field, f"not valid UTF-8: lone surrogate U+{code:04X} at character {error.start}") from None
