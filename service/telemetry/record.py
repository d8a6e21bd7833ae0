"""What is known of one request for text, in numbers: what the access log writes and a span says of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from engine.histogram import Histogram
from service.generation import GenerationRequest, Started
from service.telemetry.calls import Call
from service.telemetry.numbers import token_latencies


@dataclass(slots=True)
class Record:
    """One request. Seconds count from its arrival.

    Attributes:
        model: as it was asked for, served or not.
        call: what brought it, None if no protocol did.
        began: on the clock of time.monotonic(); `began_ns` is Unix time.
        started: None before its first token.
        reasons: why its completions ended, in that order.
        outcome: one of `service.telemetry.numbers.OUTCOMES`; "" while it runs.
        code: `ok`, `cancelled`, or a `service.errors.Code`.
    """

    request: GenerationRequest
    model: str
    call: Call | None
    began: float = field(default_factory=time.monotonic)
    began_ns: int = field(default_factory=time.time_ns)
    started: Started | None = None
    first_token: float = 0.0
    ended: float = 0.0
    generated_tokens: int = 0
    between_tokens: Histogram = field(default_factory=token_latencies)
    reasons: list[str] = field(default_factory=list)
    outcome: str = ""
    code: str = ""
    trace_id: str = ""
