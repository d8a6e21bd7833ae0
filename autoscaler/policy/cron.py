"""The five fields of cron: minute, hour, day of the month, month, day of the week.

`*`, `5`, `1-5`, `*/15`, `8-18/2`, lists of these, names of months and days, 0 and 7 for Sunday. As in Vixie's cron a
time matches when either day field does, if both are restricted. Times are those of the wall in `timezone`: in the hour
that is skipped in spring nothing starts, what starts in the hour that comes twice starts twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from zoneinfo import ZoneInfo

MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day of the month", 1, 31), ("month", 1, 12), ("day of the week", 0, 7))


@dataclass(frozen=True, slots=True)
class Cron:
    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]  # Sunday is 0
    any_day: bool
    any_weekday: bool
    zone: ZoneInfo

    def names(self, at: float) -> bool:
        """Whether the minute of this time, in Unix seconds, is one of those that it names."""
        local = datetime.fromtimestamp(at, self.zone)
        if local.minute not in self.minutes or local.hour not in self.hours or local.month not in self.months:
            return False
        day, weekday = local.day in self.days, local.isoweekday() % 7 in self.weekdays
        return (day and weekday) if self.any_day or self.any_weekday else (day or weekday)


def read_cron(text: str, timezone: str = "UTC") -> Cron:
    """Raises ValueError that names the field and the value."""
    fields = text.split()
    if len(fields) != len(FIELDS):
        raise ValueError(f"cron {text!r} has {len(fields)} fields, must have 5: minute hour day month weekday")
    values = [_values(field, *bounds) for field, bounds in zip(fields, FIELDS, strict=True)]
    try:
        zone = ZoneInfo(timezone)
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"timezone {timezone!r} is not one of the IANA database") from error
    return Cron(
        minutes=values[0],
        hours=values[1],
        days=values[2],
        months=values[3],
        weekdays=frozenset(day % 7 for day in values[4]),
        any_day=fields[2].startswith("*"),
        any_weekday=fields[4].startswith("*"),
        zone=zone,
    )


def _values(field: str, name: str, low: int, high: int) -> frozenset[int]:
    found: set[int] = set()
    for part in field.lower().split(","):
        span, slash, step_text = part.partition("/")
        first, dash, last = span.partition("-")
        try:
            if span == "*":
                start, end = low, high
            else:
                start = _number(first, name)
                end = _number(last, name) if dash else high if slash else start
            step = int(step_text) if slash else 1
        except ValueError:
            raise ValueError(f"cron: {part!r} is not a {name}") from None
        if not (low <= start <= end <= high and step >= 1):
            raise ValueError(f"cron: {part!r} is not a {name} from {low} to {high}")
        found.update(range(start, end + 1, step))
    return frozenset(found)


def _number(text: str, name: str) -> int:
    if name == "month" and text in MONTHS:
        return MONTHS.index(text) + 1
    if name == "day of the week" and text in DAYS:
        return DAYS.index(text)
    return int(text)
