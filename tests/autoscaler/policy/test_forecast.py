from __future__ import annotations

import pytest

from autoscaler.policy.forecast import Forecasts, Most, Smoothed


def test_the_mean_starts_plain_and_forgets() -> None:
    mean = Smoothed(30.0)
    assert mean.add(4.0, 5.0) == 4.0
    assert mean.add(8.0, 5.0) > 5.9
    for _ in range(200):
        mean.add(1.0, 5.0)
    assert mean.value == pytest.approx(1.0)


def test_the_most_of_a_window() -> None:
    most = Most(10.0)
    assert [most.add(at, value) for at, value in ((0, 5), (5, 3), (10, 2), (10.1, 1), (16, 0), (21, 0))] == [
        5,
        5,
        5,
        3,
        2,
        0,
    ]


def test_a_trend_leads_over_the_horizon_and_never_below_what_is() -> None:
    rising, falling = Forecasts(), Forecasts()
    for step in range(200):
        up = rising.add(step * 5.0, 5.0, 10.0 + 0.01 * 5 * step, 120.0)
        down = falling.add(step * 5.0, 5.0, 30.0 - 0.01 * 5 * step, 120.0)
    trend, level = rising.names.index("trend held short"), rising.names.index("level held short")
    assert up[trend] == pytest.approx(10.0 + 0.01 * (199 * 5 + 120), abs=0.2)
    assert up[level] == pytest.approx(10.0 + 0.01 * (199 * 5 - 30), abs=0.2)
    assert down[trend] >= down[level] > 0
