"""The fake API server's own promises: what it does not know it refuses, and what it was told it tells."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from autoscaler.cluster.client import connect
from autoscaler.cluster.face import LEASES, QUEUE_AUTOSCALERS, ClusterError, Json
from tests.autoscaler.api_under_test import CRDS, definition
from tests.autoscaler.bodies import lease, scaler
from tests.autoscaler.fake_api import FakeApi, Fault, selectors
from tests.autoscaler.fake_api.cel import Rule, UnsupportedRule
from tests.autoscaler.fake_api.errors import ApiError
from tests.autoscaler.fake_api.table import age, find


@pytest.mark.parametrize(
    ("rule", "value", "holds"),
    [
        ("self.low <= self.high", {"low": 1, "high": 1}, True),
        ("self.low <= self.high", {"low": 2, "high": 1}, False),
        ("!has(self.pin) || self.pin <= self.high", {"high": 1}, True),
        ("!has(self.pin) || self.pin <= self.high", {"high": 1, "pin": 2}, False),
        ("!(has(self.a) && has(self.b))", {"a": 0, "b": 0}, False),
        ("self.parts.all(each, each.n < 3) && size(self.parts) == 2", {"parts": [{"n": 1}, {"n": 2}]}, True),
        ("self.parts.exists(each, each.n == 3)", {"parts": [{"n": 1}]}, False),
        ("self.kind in ['a', 'b'] ? self.n > 0 : self.n == 0", {"kind": "c", "n": 0}, True),
        ("self.name.matches('^[a-z]+$')", {"name": "A"}, False),
        ("self.n % 2 == 0 && 7 / 2 == 3", {"n": 4}, True),
    ],
)
def test_a_rule_is_evaluated(rule: str, value: Json, holds: bool) -> None:
    assert Rule(rule).holds(value) is holds


def test_a_rule_about_the_past_knows_both() -> None:
    rule = Rule("self >= oldSelf")
    assert rule.is_transition
    assert not rule.holds(1, 2)


@pytest.mark.parametrize(
    "rule",
    [
        "duration(self.a) > duration('1s')",
        "self.a ? self.b ? 1 : 2 : 3",
        "self..a",
        "x(1)",
        "self.a is self.b",
        "other.a > 1",
    ],
)
def test_a_rule_that_is_not_understood_is_refused(rule: str) -> None:
    with pytest.raises(UnsupportedRule):
        Rule(rule)


def changed(**schema: Any) -> Json:
    """Our CRD with more in the schema of its spec."""
    crd = copy.deepcopy(definition())
    crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"] |= schema
    return crd


@pytest.mark.parametrize(
    "schema", [{"x-kubernetes-validations": [{"rule": "self.a.b()"}]}, {"oneOf": [{"required": ["replicas"]}]}]
)
def test_a_definition_that_cannot_be_kept_to_the_letter_is_not_registered(schema: Json) -> None:
    with pytest.raises(ApiError, match="known here") as refused:
        FakeApi().apply(changed(**schema))
    assert refused.value.code == 422


@pytest.mark.parametrize(
    ("path", "found"),
    [
        (".spec.name", "a"),
        ('.status.conditions[?(@.type=="Ready")].status', "True"),
        (".status.conditions[1].type", "Other"),
        (".status.nothing.here", None),
        (".status.conditions[7].type", None),
    ],
)
def test_a_printer_column_finds_its_value(path: str, found: str | None) -> None:
    conditions = [{"type": "Ready", "status": "True"}, {"type": "Other", "status": "False"}]
    assert find({"spec": {"name": "a"}, "status": {"conditions": conditions}}, path) == found


def test_ages_are_told_as_kubectl_tells_them() -> None:
    seconds = (-1, 5, 119, 120, 7200, 10_800, 172_800)
    assert [*map(age, seconds)] == ["0s", "5s", "119s", "2m", "120m", "3h", "2d"]


async def test_each_call_is_logged_with_who_made_it(tmp_path: Path) -> None:
    async with FakeApi() as api:
        api.faults.append(Fault(verb="create", path="/leases", times=2, code=503))
        for user in ("system:masters-a", "kubernetes-admin"):
            async with connect(str(api.kubeconfig(tmp_path, user))) as cluster:
                for _ in range(3):
                    try:
                        await cluster.create(LEASES, lease())
                    except ClusterError:
                        pass
        codes = [(call.request.user, call.code) for call in api.calls]
        assert codes == [
            ("system:masters-a", 503),
            ("system:masters-a", 503),
            ("system:masters-a", 403),
            ("kubernetes-admin", 201),
            ("kubernetes-admin", 409),
            ("kubernetes-admin", 409),
        ]
        [write] = api.writes(resource="leases")
        assert write.body == lease()


async def test_what_goes_with_a_definition_are_its_objects(tmp_path: Path) -> None:
    async with FakeApi() as api:
        api.apply(definition(), scaler())
        async with connect(str(api.kubeconfig(tmp_path))) as cluster:
            assert len((await cluster.list(QUEUE_AUTOSCALERS))["items"]) == 1
            api.delete(CRDS, definition()["metadata"]["name"], namespace="")
            with pytest.raises(ClusterError, match="could not find the requested resource"):
                await cluster.list(QUEUE_AUTOSCALERS)


def test_a_selector_is_said_in_one_line() -> None:
    expressions = [
        {"key": "tier", "operator": "In", "values": ["b", "a"]},
        {"key": "old", "operator": "NotIn", "values": ["1"]},
        {"key": "gpu", "operator": "Exists"},
        {"key": "test", "operator": "DoesNotExist"},
    ]
    assert (
        selectors.text_of({"matchLabels": {"b": "2", "a": "1"}, "matchExpressions": expressions})
        == "a=1,b=2,tier in (a,b),old notin (1),gpu,!test"
    )
    assert selectors.text_of({}) == ""
