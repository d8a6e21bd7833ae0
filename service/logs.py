"""The form of the service's log lines, see `engine.logs`, and which of libraries are left out."""

from __future__ import annotations

import logging

from engine import logs


def configure(level: str, *, as_json: bool) -> None:
    """Send all logs of this process to stderr in one format."""
    logs.configure(level, as_json=as_json)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line per request of a download
