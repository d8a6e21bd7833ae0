"""Who is calling: found out once at the edge of each protocol, read where an adapter builds its GenerationRequest."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """The sender of one request.

    Attributes:
        tenant: name of its API key or client certificate; "" = nobody was asked.
        admin: may also change what is served.
    """

    tenant: str = ""
    admin: bool = True


ANYBODY = Caller()
CALLER: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)
"""Set by the interceptor or middleware of a request, in the task that serves it and in those that it starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLimits:
    """How much of the server a tenant may have. None = as much as everybody.

    Attributes:
        weight: its share of the engine beside others.
        max_running: completions that run at once; a request of more of them runs alone.
        max_queued: requests that wait at once.
        tokens_per_minute: of prompts and answers together, on average; one minute's may be used up at once.
        best_priority: the best class that it may ask for; a lower number is better.
    """

    weight: float = 1.0
    max_running: int | None = None
    max_queued: int | None = None
    tokens_per_minute: int | None = None
    best_priority: int | None = None
