"""The status: what is written when, and what a person hears of."""

from __future__ import annotations

from typing import Any

from autoscaler.controller.status import (
    DECISIONS,
    TEXT_SECONDS,
    Condition,
    Is,
    Report,
    Scaled,
    merged,
    news,
    worth_writing,
)

NOW = 1_764_144_000.0  # 2025-11-26T08:00:00Z
READY = Condition("Ready", Is.TRUE, "Reconciled", "all is well")


def report(**fields: Any) -> Report:
    return Report(**{"generation": 1, "conditions": (READY,), "reason": "2 are enough", "desired": 2} | fields)


def test_a_first_status_is_written() -> None:
    after = merged({}, report(), NOW)
    assert worth_writing({}, after, 0.0)
    assert after["conditions"][0] == {
        "type": "Ready",
        "status": "True",
        "reason": "Reconciled",
        "message": "all is well",
        "observedGeneration": 1,
        "lastTransitionTime": "2025-11-26T08:00:00Z",
    }


def test_what_has_not_changed_is_not_written() -> None:
    before = merged({}, report(), NOW)
    assert not worth_writing(before, merged(before, report(), NOW + 3600), 3600.0)


def test_new_words_alone_wait_a_minute() -> None:
    before = merged({}, report(), NOW)
    after = merged(before, report(reason="2.01 are enough", learned={"coldStartSeconds": 31.4159}), NOW + 5)
    assert not worth_writing(before, after, TEXT_SECONDS - 1)
    assert worth_writing(before, after, TEXT_SECONDS)
    assert after["learned"] == {"coldStartSeconds": 31.42}


def test_a_condition_keeps_its_time_while_its_status_stays() -> None:
    before = merged({}, report(), NOW)
    other = Condition("Ready", Is.TRUE, "Other")
    kept, turned = (
        merged(before, report(conditions=(condition,)), NOW + 60)["conditions"][0]["lastTransitionTime"]
        for condition in (other, Condition("Ready", Is.FALSE, "Other"))
    )
    assert (kept, turned) == ("2025-11-26T08:00:00Z", "2025-11-26T08:01:00Z")


def test_the_last_decisions_are_kept_newest_first() -> None:
    status: dict[str, Any] = {}
    for number in range(DECISIONS + 3):
        status = merged(status, report(scaled=Scaled(NOW, number, number + 1, "more")), NOW)
    assert [each["to"] for each in status["decisions"]] == list(range(DECISIONS + 3, 3, -1))
    assert status["lastScaleTime"] == "2025-11-26T08:00:00Z"


def test_a_dry_run_scales_nothing() -> None:
    status = merged({}, report(scaled=Scaled(NOW, 1, 2, "more", written=False)), NOW)
    assert status["decisions"][0]["reason"] == "dry run: more"
    assert "lastScaleTime" not in status


def test_what_is_not_known_this_time_stays() -> None:
    before = merged({}, report(ready=2), NOW)
    assert merged(before, report(ready=None, desired=None), NOW)["ready"] == 2


def test_warnings_are_news_and_so_is_their_end_but_not_what_is_well_from_the_start() -> None:
    silent = Condition("MetricsAvailable", Is.FALSE, "Missing", warning=True)
    found = Condition("MetricsAvailable", Is.TRUE, "Found")
    assert news({}, (READY, found)) == []
    assert news({}, (READY, silent)) == [silent]
    before = merged({}, report(conditions=(READY, silent)), NOW)
    assert news(before, (READY, silent)) == []
    assert news(before, (READY, found)) == [found]
