"""Log lines: events with fields, in both forms; and the progress of a pull where there is no terminal."""

from __future__ import annotations

import io
import json
import logging
import sys
from datetime import datetime

from service.logs import JsonFormatter, TextFormatter
from service.progress import lines


def record(message: str, *, failed: bool = False, **fields: object) -> logging.LogRecord:
    made = logging.getLogger("service.server").makeRecord(
        "service.server", logging.INFO, __file__, 1, message, (), None, extra=fields
    )
    if failed:
        try:
            raise RuntimeError("boom")
        except RuntimeError:
            made.exc_info = sys.exc_info()
    return made


def test_json_is_one_object_with_the_fields() -> None:
    text = JsonFormatter().format(record("ready", address="127.0.0.1:8001", note="two\nlines"))
    assert "\n" not in text
    line = json.loads(text)
    assert datetime.fromisoformat(line.pop("time")).utcoffset() is not None
    assert line == {
        "level": "info",
        "logger": "service.server",
        "event": "ready",
        "address": "127.0.0.1:8001",
        "note": "two\nlines",
    }


def test_json_keeps_a_traceback_on_the_line() -> None:
    text = JsonFormatter().format(record("failed", failed=True))
    assert "\n" not in text
    assert json.loads(text)["traceback"].endswith("RuntimeError: boom")


def test_text_puts_fields_after_the_event() -> None:
    assert TextFormatter().format(record("ready", port=8001, model="m")).endswith(" info    ready port=8001 model=m")
    assert TextFormatter().format(record("failed", failed=True)).endswith("RuntimeError: boom")


def test_progress_without_a_terminal_is_the_first_and_the_last_line_of_a_quick_pull() -> None:
    out = io.StringIO()
    report = lines("toy", out, every=3600)
    for done in (0, 40_000_000, 80_000_000, 100_000_000):
        report(done, 100_000_000)
    assert out.getvalue() == "pull toy: 0 of 100 MB (0%)\npull toy: 100 of 100 MB (100%)\n"


def test_progress_without_a_terminal_goes_on_with_time() -> None:
    out = io.StringIO()
    report = lines("toy", out, every=0)
    for done in (0, 50, 100):
        report(done, 100)
    assert out.getvalue().count("\n") == 3
