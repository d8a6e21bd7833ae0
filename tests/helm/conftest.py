"""The chart as both helms render it, once for each set of values."""

from __future__ import annotations

from functools import cache

import pytest

from helm.chart import Object, objects, render, value_sets
from helm.tools import HELMS, runs_here

SETS = value_sets()
COMPONENT = "app.kubernetes.io/component"


@cache
def rendering(helm: str, name: str) -> str:
    return render(helm, SETS[name])


def rendered(name: str) -> list[Object]:
    """Objects of a set of values, fresh for whoever changes them."""
    return objects(rendering(HELMS[-1], name))


def one(found: list[Object], kind: str, name: str | None = None) -> Object:
    [each] = [each for each in found if each["kind"] == kind and name in (None, each["metadata"]["name"])]
    return each


def workload(found: list[Object]) -> Object:
    """The Deployment or StatefulSet of the servers."""
    [each] = [each for each in workloads(found) if each["metadata"]["labels"][COMPONENT] == "server"]
    return each


def workloads(found: list[Object]) -> list[Object]:
    return [each for each in found if each["kind"] in ("Deployment", "StatefulSet")]


def server(found: list[Object]) -> Object:
    """The container of the servers."""
    [container] = workload(found)["spec"]["template"]["spec"]["containers"]
    return container


def pod_specs(found: list[Object]) -> list[Object]:
    """Of every pod that the release brings: servers, the operator's, the Job's, the test's."""
    specs = [each["spec"]["template"]["spec"] for each in found if "template" in each.get("spec", {})]
    return specs + [each["spec"] for each in found if each["kind"] == "Pod"]


@pytest.fixture(autouse=True, scope="session")
def _programs() -> None:
    if not runs_here():
        pytest.skip("helm and kubectl are fetched for Linux on x86-64 alone")
