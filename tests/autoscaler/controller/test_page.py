"""docs/autoscaling.md tells of every field, condition, metric and option that there is, and of tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from autoscaler.controller.metrics import PREFIX, Metrics
from autoscaler.decision import Limit
from autoscaler.main import cli
from tests.autoscaler.api_under_test import definition

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/autoscaling.md").read_text()


def fields() -> list[str]:
    """Of the resource's spec, without what is deeper than two names."""
    [version] = definition()["spec"]["versions"]
    return list(version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"])


def metrics() -> list[str]:
    return [each.name.removeprefix(PREFIX) for each in Metrics().registry.collect()]


def options() -> list[str]:
    return [name for each in cli.params for name in each.opts if name.startswith("--")]


@pytest.mark.parametrize("name", [*fields(), *metrics(), *options(), *(each.value for each in Limit)])
def test_the_page_names(name: str) -> None:
    assert re.search(rf"`[^`\n]*\b{name.lstrip('-')}", PAGE), name


def test_the_chart_shows_metrics_that_there_are() -> None:
    files = (each for each in (ROOT / "helm/nemoserve").rglob("*") if each.suffix in (".json", ".yaml"))
    shown = set(re.findall(rf"{PREFIX}([a-z_]+)", "".join(each.read_text() for each in files)))
    there = {each.removeprefix(PREFIX) for family in Metrics().registry.collect() for each in _samples(family.name)}
    assert shown
    assert shown - there == set()


def _samples(name: str) -> list[str]:
    return [name, *(f"{name}_{end}" for end in ("total", "bucket", "sum", "count"))]


def test_the_tests_that_it_names_are_there() -> None:
    there = "".join(each.read_text() for each in (ROOT / "tests/autoscaler").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", PAGE)
    assert len(named) > 15
    assert [each for each in named if f"def {each}(" not in there] == []
