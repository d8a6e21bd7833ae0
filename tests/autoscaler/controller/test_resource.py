"""A QueueAutoscaler read into settings: defaults, every field, and errors that name field, value and limit."""

from __future__ import annotations

from typing import Any

import pytest

from autoscaler.cluster.face import DEPLOYMENTS, STATEFUL_SETS
from autoscaler.resource import InvalidSpecError, read_spec
from autoscaler.settings import Behavior, Direction, ScaleToZero, Schedule, Settings, Target
from tests.autoscaler.api_under_test import definition

REF = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "nemo"}


def resource(**spec: Any) -> dict[str, Any]:
    return {"spec": {"scaleTargetRef": REF, "maxReplicas": 4} | spec}


def test_what_is_not_said_is_as_in_the_settings() -> None:
    spec = read_spec(resource())
    assert spec.settings == Settings(max_replicas=4)
    assert (spec.pin, spec.dry_run, spec.grpc_port, spec.metrics_port) == (None, False, 8001, 8000)
    assert spec.drain_seconds == 300.0
    assert (spec.target.resource, str(spec.target)) == (DEPLOYMENTS, "Deployment/nemo")


def test_every_field_is_read() -> None:
    spec = read_spec(
        resource(
            scaleTargetRef=REF | {"kind": "StatefulSet"},
            minReplicas=0,
            maxReplicas=9,
            replicas=3,
            target={"ttftSeconds": 1, "itlSeconds": 0.05, "lateShare": 0.02, "queueWaitSeconds": 0.5},
            behavior={
                "scaleOut": {"windowSeconds": 5, "maxStep": 2, "periodSeconds": 30},
                "scaleIn": {"windowSeconds": 0, "maxStep": 1},
                "drainSeconds": 900,
            },
            scaleToZero={"enabled": True, "idleSeconds": 60},
            schedules=[{"cron": "0 8 * * 1-5", "durationSeconds": 3600, "minReplicas": 2, "timezone": "Europe/Berlin"}],
            dryRun=True,
            grpcPort=1,
            metricsPort=2,
        )
    )
    assert (spec.target.resource, spec.target.ordered) == (STATEFUL_SETS, True)
    assert (spec.pin, spec.dry_run, spec.grpc_port, spec.metrics_port) == (3, True, 1, 2)
    assert spec.drain_seconds == 900.0
    assert spec.settings == Settings(
        min_replicas=0,
        max_replicas=9,
        target=Target(1.0, 0.05, 0.02, 0.5),
        behavior=Behavior(Direction(5.0, 2, 30.0), Direction(0.0, 1, 60.0)),
        scale_to_zero=ScaleToZero(enabled=True, idle_seconds=60.0),
        schedules=(Schedule("0 8 * * 1-5", 3600.0, 2, "Europe/Berlin"),),
    )


def test_what_the_definition_fills_in_is_what_is_read_without_it() -> None:
    [version] = definition()["spec"]["versions"]
    behavior = version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["behavior"]["properties"]
    filled = resource(behavior={"drainSeconds": behavior["drainSeconds"]["default"]})
    assert read_spec(filled) == read_spec(resource())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"maxReplicas": "4"}, "spec.maxReplicas is '4', must be a whole number from 1 to 1000"),
        ({"maxReplicas": True}, "spec.maxReplicas is True, must be a whole number from 1 to 1000"),
        ({"minReplicas": 5}, "spec.maxReplicas is 4, must be spec.minReplicas = 5 or more"),
        ({"minReplicas": 0}, "spec.minReplicas is 0, must be 1 or more while spec.scaleToZero.enabled is false"),
        ({"replicas": -1}, "spec.replicas is -1, must be a whole number from 0 to 1000"),
        ({"dryRun": "yes"}, "spec.dryRun is 'yes', must be true or false"),
        ({"grpcPort": 0}, "spec.grpcPort is 0, must be a whole number from 1 to 65535"),
        ({"target": {"ttftSeconds": 0}}, "spec.target.ttftSeconds is 0, must be a number above 0 and up to 604800"),
        ({"target": {"ttftSeconds": float("nan")}}, "spec.target.ttftSeconds is nan, must be a number"),
        ({"target": {"lateShare": 0.9}}, "spec.target.lateShare is 0.9, must be a number above 0 and up to 0.5"),
        ({"target": []}, "spec.target is [], must be an object"),
        (
            {"behavior": {"scaleIn": {"maxStep": 1}}},
            "spec.behavior.scaleIn.windowSeconds is missing, must be given where spec.behavior.scaleIn.maxStep is",
        ),
        (
            {"behavior": {"scaleOut": {"windowSeconds": -1}}},
            "spec.behavior.scaleOut.windowSeconds is -1, must be a number from 0 up to 604800",
        ),
        (
            {"behavior": {"drainSeconds": 86_401}},
            "spec.behavior.drainSeconds is 86401, must be a number from 0 up to 86400",
        ),
        ({"scaleTargetRef": REF | {"kind": "Job"}}, "spec.scaleTargetRef.kind is 'Job', must be one of Deployment"),
        ({"scaleTargetRef": {}}, "spec.scaleTargetRef.kind is missing, must be text"),
        ({"scaleTargetRef": REF | {"name": "n" * 64}}, "must be at most 63 letters"),
        ({"schedules": [{"cron": "* * * * *"}]}, "spec.schedules[0].durationSeconds is missing"),
        ({"schedules": ["* * * * *"]}, "spec.schedules is ['* * * * *'], must be a list of objects"),
        ({"schedules": [{}] * 33}, "spec.schedules has 33 entries, must have at most 32"),
        (
            {"schedules": [{"cron": "* * * * *", "durationSeconds": 1, "minReplicas": 5}]},
            "spec.schedules[0].minReplicas is 5, must be a whole number from 0 to 4",
        ),
        (
            {"schedules": [{"cron": "99 * * * *", "durationSeconds": 1}]},
            "spec.schedules[0]: cron: '99' is not a minute",
        ),
    ],
)
def test_what_cannot_be_followed_is_named_with_its_value_and_the_limit(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSpecError) as caught:
        read_spec(resource(**spec))
    assert message in str(caught.value)
