from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from autoscaler.policy.cron import read_cron


def named(cron: str, time: str, zone: str = "UTC") -> bool:
    return read_cron(cron, zone).names(datetime.fromisoformat(time).replace(tzinfo=ZoneInfo(zone)).timestamp())


@pytest.mark.parametrize(
    ("cron", "yes", "no"),
    [
        ("* * * * *", "2026-11-26T03:17", None),
        ("30 8 * * *", "2026-11-26T08:30", "2026-11-26T08:31"),
        ("*/15 * * * *", "2026-11-26T08:45", "2026-11-26T08:50"),
        ("0 8-18/2 * * *", "2026-11-26T10:00", "2026-11-26T11:00"),
        ("0 9 * * mon-fri", "2026-11-26T09:00", "2026-11-28T09:00"),
        ("0 9 * * 7", "2026-11-29T09:00", "2026-11-30T09:00"),
        ("0 9 * * sun", "2026-11-29T09:00", "2026-11-30T09:00"),
        ("0 0 1,15 * *", "2026-11-15T00:00", "2026-11-16T00:00"),
        ("0 0 13 * 5", "2026-11-13T00:00", "2026-11-26T00:00"),  # a Friday and the 13th
        ("0 0 13 * 5", "2026-11-27T00:00", None),  # either day will do
        ("0 0 * dec *", "2026-12-01T00:00", "2026-11-30T00:00"),
        ("5/20 * * * *", "2026-11-26T01:45", "2026-11-26T01:40"),
    ],
)
def test_the_five_fields(cron: str, yes: str, no: str | None) -> None:
    assert named(cron, yes)
    assert no is None or not named(cron, no)


def test_the_clock_is_the_one_on_the_wall_there() -> None:
    new_york = read_cron("0 9 * * *", "America/New_York")
    assert new_york.names(datetime.fromisoformat("2026-01-15T14:00+00:00").timestamp())  # winter: five hours
    assert new_york.names(datetime.fromisoformat("2026-07-15T13:00+00:00").timestamp())  # summer: four
    assert not new_york.names(datetime.fromisoformat("2026-07-15T14:00+00:00").timestamp())


@pytest.mark.parametrize(
    ("cron", "words"),
    [
        ("* * * *", "has 4 fields"),
        ("60 * * * *", "'60' is not a minute from 0 to 59"),
        ("* 5-2 * * *", "'5-2' is not a hour"),
        ("* * 0 * *", "day of the month"),
        ("* * * foo *", "'foo' is not a month"),
        ("*/0 * * * *", "'\\*/0' is not a minute"),
        ("* * * * mon-", "day of the week"),
    ],
)
def test_what_is_no_cron_says_which_field(cron: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_cron(cron)


def test_a_zone_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match="Mars/Olympus"):
        read_cron("* * * * *", "Mars/Olympus")
