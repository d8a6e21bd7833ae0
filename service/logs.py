"""The form of the service's log lines, see `process.logs`; what is logged within a call says which it is."""

from __future__ import annotations

import logging

from process import logs
from service.telemetry.calls import CALL


def configure(level: str, *, as_json: bool) -> None:
    """Send all logs of this process to stderr in one format."""
    logs.configure(level, as_json=as_json)
    for handler in logging.getLogger().handlers:
        handler.addFilter(within_call)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line per request of a download


def within_call(record: logging.LogRecord) -> bool:
    """Add `request_id` and `trace_id` of the call that the line is about, as far as it has them and does not say so
    itself."""
    if (call := CALL.get()) is not None:
        for name, value in (("request_id", call.request_id), ("trace_id", call.trace_id)):
            if value and name not in vars(record):
                setattr(record, name, value)
    return True
