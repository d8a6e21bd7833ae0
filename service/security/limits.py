"""How large a request and its headers may be, on either port."""

from __future__ import annotations

MAX_REQUEST_BYTES = 16 * 2**20
"""128 bytes for each token of the longest context, 131,072: the longest token of Tekken has 78, the average one 4. JSON
may write a character in six; Triton allows 2 GiB, with which one client could fill the memory."""
MAX_HEADER_BYTES = 16 * 2**10
"""Of all headers of a request: keys, traces and the cookies of a proxy have a few. gRPC never takes more. Over HTTP a
head that is not whole after so many bytes is given up."""
