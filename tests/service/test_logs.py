"""Log lines: events with fields, in both forms; and how far a pull or a load is."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from engine import Done
from process.logs import JsonFormatter, TextFormatter, fields
from service.progress import LoadLog, lines, load_progress


def record(message: str, *, failed: bool = False, **extra: object) -> logging.LogRecord:
    made = logging.getLogger("service.server").makeRecord(
        "service.server", logging.INFO, __file__, 1, message, (), None, extra=extra
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


def test_text_stays_on_its_line_whatever_a_client_calls_itself() -> None:
    text = TextFormatter().format(record("request", model="a\n12:00:00 info ready\r\x1b[2J\u2028\ud800é漢"))
    assert text.endswith(r" model=a\n12:00:00 info ready\r\x1b[2J\u2028\ud800é漢")


def test_progress_without_a_terminal_is_the_first_and_the_last_line_of_a_quick_pull() -> None:
    out = io.StringIO()
    report = lines("toy", out, every=3600)
    report(0, 0)  # another process fetches
    for done in (0, 40_000_000, 80_000_000, 100_000_000):
        report(done, 100_000_000)
    assert out.getvalue() == "pull toy: 0 of 100 MB (0%)\npull toy: 100 of 100 MB (100%)\n"


def test_progress_without_a_terminal_goes_on_with_time() -> None:
    out = io.StringIO()
    report = lines("toy", out, every=0)
    for done in (0, 50, 100):
        report(done, 100)
    assert out.getvalue().count("\n") == 3


def test_a_load_without_a_terminal_is_a_line_now_and_then_and_one_at_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "service.progress")
    now, total = 100.0, 8_000_000_000
    report = LoadLog(every=5.0, clock=lambda: now)
    report("start", Done(0.0))
    now += 3  # of importing libraries, in which no disk had to read
    report("read weights", Done(0.0, 0, total))
    for second in range(1, 17):
        now += 1
        report("read weights", Done(second / 20, second * total // 16, total))
    report("warm up", Done(0.8, total, total))
    written = [(each.getMessage(), fields(each)) for each in caplog.records]
    assert [event for event, _ in written] == ["loading", "loading", "loading", "weights read"]
    first, last = written[0][1], written[-1][1]
    assert first == {"gb": "2.50", "of_gb": "8.00", "mb_per_s": 500, "seconds": 5.0, "seconds_left": 11}
    assert last == {"gb": "8.00", "of_gb": "8.00", "mb_per_s": 500, "seconds": 16.0}


def test_a_load_on_a_terminal_shows_a_bar_with_bytes_and_their_rate(smollm2_path: Path) -> None:
    ours, theirs = os.openpty()
    program = "import sys; from service.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "chat", str(smollm2_path), "--once", "Hi", "--max-tokens", "1"]
    environ = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environ)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the program has ended
        while piece := os.read(ours, 65536):
            shown += piece
    os.close(ours)
    assert process.wait(60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    size = smollm2_path.stat().st_size / 1e6
    done, total = map(float, re.findall(r"([\d.]+)/([\d.]+) MB", text)[-1])
    assert done == total == pytest.approx(size, rel=0.05)  # the rest of the file is its header
    assert "MB/s" in text or "GB/s" in text


def test_the_bar_of_a_load_has_room_in_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with load_progress("mistral-nemo-12b-instruct-fp8", bar=True) as report:
        report("read weights", Done(0.4, 10_000_000_000, 24_500_000_000))
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert "read weights" in line
    assert "10.0/24.5 GB" in line
