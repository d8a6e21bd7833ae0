"""One RPC or HTTP request as the edge of a protocol sees it: what the requests for text within it want to know of it.

    edge: open(…) ──► CALL ──► adapter ──► ServedModel.generate ──► observer reads CALL ──► … ──► edge: close(code)

One RPC can bring many requests (ModelStreamInfer), or none that came as far as the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.trace import Span


@dataclass(slots=True, kw_only=True)
class Call:
    """Set by the edge's interceptor or middleware, in the task that serves the call and in those that it starts.

    Attributes:
        protocol: grpc or http.
        named: tells what was called, see `method`; asked late, because a route is found within the call.
        peer: the address of who called.
        span: the SERVER span, None while nobody traces.
        requests: how many requests for text it has brought.
    """

    protocol: str
    named: Callable[[], str]
    peer: str = ""
    request_id: str = ""
    span: Span | None = None
    began: float = field(default_factory=time.monotonic)
    requests: int = 0

    @property
    def method(self) -> str:
        """The full name of an RPC, or method and route of an HTTP request; `_OTHER` for what is not served."""
        return self.named()

    @property
    def trace_id(self) -> str:
        """Empty while nobody traces."""
        return "" if self.span is None else format(self.span.get_span_context().trace_id, "032x")


CALL: ContextVar[Call | None] = ContextVar("call", default=None)
