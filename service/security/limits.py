"""How large a request and its headers may be, on either port."""

from __future__ import annotations

MAX_REQUEST_BYTES = 16 * 2**20
"""128 bytes for each token of the longest context, 131,072: the longest token of Tekken has 78, the average one 4. JSON
may write a character in six; Triton allows 2 GiB, with which one client could fill the memory."""
MAX_JSON_VALUES = 2**19
"""Of a JSON text: the token ids of four of the longest contexts. A value of two bytes takes up to a hundred of memory,
and all of them up to half a second in which the event loop serves nobody; a thread would hold Python's lock as long."""
MAX_HEADER_BYTES = 16 * 2**10
"""Of all headers of a request: keys, traces and the cookies of a proxy have a few. gRPC never takes more. Over HTTP a
head that is not whole after so many bytes is given up."""


def has_too_many_values(json: str | bytes) -> bool:
    """Counts what begins a value or a container, also where it stands in a text: takes a millisecond for each MiB."""
    if isinstance(json, str):
        return json.count(",") + json.count("[") + json.count("{") > MAX_JSON_VALUES
    return json.count(b",") + json.count(b"[") + json.count(b"{") > MAX_JSON_VALUES
