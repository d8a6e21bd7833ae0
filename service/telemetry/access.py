"""The access log: one line for each request at its end. Numbers, names and ids; never a word of prompt or answer.

A call that brings no request as far as the model, because it asks for something else or is refused at the edge, gets a
line of its own; probes and scrapes do not, unless the log tells everything (`--log-level debug`).
"""

from __future__ import annotations

import logging
import time
from typing import Any

from service.telemetry.calls import Call
from service.telemetry.record import Record

log = logging.getLogger(__name__)

FAULTS = ("internal", "unknown")  # of ours; everything else is the business of who called


def log_request(record: Record) -> None:
    """Call once, when the request has ended."""
    level = logging.WARNING if record.code in FAULTS else logging.INFO
    if not log.isEnabledFor(level):
        return
    request, started, call = record.request, record.started, record.call
    line: dict[str, Any] = {"request_id": request.request_id}
    if record.trace_id:
        line["trace_id"] = record.trace_id
    if request.tenant:
        line["tenant"] = request.tenant
    if call is not None:
        line |= {"protocol": call.protocol, "method": call.method, "peer": call.peer}
    line |= {"model": record.model, "code": record.code}
    if record.reasons:
        line["finish_reason"] = ",".join(record.reasons)
    if started is not None:
        line |= {
            "prompt_tokens": started.prompt_tokens,
            "cached_tokens": started.cached_tokens,
            "output_tokens": record.generated_tokens,
            "queue_ms": _ms(started.queue_seconds),
            "ttft_ms": _ms(record.first_token),
        }
        if record.generated_tokens > 1:
            line["itl_p50_ms"] = _ms(record.between_tokens.quantile(0.5))
            line["itl_p99_ms"] = _ms(record.between_tokens.quantile(0.99))
    log.log(level, "request", extra=line | {"total_ms": _ms(record.ended)})


def log_call(call: Call, code: str, *, quiet: bool = False) -> None:
    """Call once, when a call has ended that brought no request.

    Args:
        quiet: it is one of those that come every few seconds.
    """
    level = logging.DEBUG if quiet else logging.WARNING if code in FAULTS else logging.INFO
    if not log.isEnabledFor(level):
        return
    line: dict[str, Any] = {"request_id": call.request_id} if call.request_id else {}
    line |= {"protocol": call.protocol, "method": call.method, "peer": call.peer, "code": code}
    log.log(level, "call", extra=line | {"total_ms": _ms(time.monotonic() - call.began)})


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
