"""What an API server refuses, and whom, as the operator depends on it."""

from __future__ import annotations

import pytest

from autoscaler.cluster import objects
from autoscaler.cluster.face import (
    DEPLOYMENTS,
    EVENTS,
    LEASES,
    PODS,
    QUEUE_AUTOSCALERS,
    STATEFUL_SETS,
    ClusterError,
    Json,
    Kind,
)
from tests.autoscaler.api_under_test import Api
from tests.autoscaler.bodies import event, lease, pod, scaler, workload

ROLES = Kind("rbac.authorization.k8s.io", "v1", "roles")
BINDINGS = Kind("rbac.authorization.k8s.io", "v1", "rolebindings")
ACCOUNTS = Kind("", "v1", "serviceaccounts")


# -- what is checked -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"minReplicas": 5}, "minReplicas must be at most maxReplicas"),
        ({"minReplicas": 0}, "minReplicas is 0 only where scaleToZero.enabled is true"),
        ({"maxReplicas": "four"}, "spec.maxReplicas in body must be of type integer"),
        ({"maxReplicas": 0}, "spec.maxReplicas in body should be greater than or equal to 1"),
        ({"scaleTargetRef": {"kind": "Pod", "name": "nemo"}}, 'Unsupported value: "Pod"'),
        ({"scaleTargetRef": {"kind": "Deployment"}}, "spec.scaleTargetRef.name: Required value"),
        ({"scaleTargetRef": {"kind": "Deployment", "name": "A B"}}, "should match"),
        ({"target": {"queueWaitSeconds": 1, "queuedTokensPerReplica": 1}}, "either queueWaitSeconds or"),
        (
            {"schedules": [{"cron": "0 8 * * *", "durationSeconds": 60, "minReplicas": 9}]},
            "minReplicas of every schedule",
        ),
    ],
)
async def test_a_custom_resource_that_its_definition_forbids_is_refused(api: Api, spec: Json, said: str) -> None:
    with pytest.raises(ClusterError) as refused:
        await api.cluster.create(QUEUE_AUTOSCALERS, scaler(**spec))
    assert (refused.value.code, refused.value.reason) == (422, "Invalid")
    assert said in str(refused.value)


async def test_a_custom_resource_gets_defaults_and_loses_what_is_unknown(api: Api) -> None:
    created = await api.cluster.create(QUEUE_AUTOSCALERS, scaler(colour="blue"))
    assert created["spec"]["minReplicas"] == 1
    assert created["spec"]["target"]["ttftSeconds"] == 2
    assert "colour" not in created["spec"]
    path = api.path(QUEUE_AUTOSCALERS) + "?fieldValidation=Strict"
    answer = await api.call("POST", path, scaler("other", colour="blue"))
    assert (answer.code, answer.reason) == (400, "BadRequest")
    assert 'unknown field "spec.colour"' in answer.body["message"]


async def test_times_of_leases_need_their_microseconds(api: Api) -> None:
    at = objects.micro_timestamp(1_790_000_000.25)
    created = await api.cluster.create(LEASES, lease(renewTime=at, acquireTime=at))
    assert objects.seconds(created["spec"]["renewTime"]) == 1_790_000_000.25
    with pytest.raises(ClusterError) as refused:
        await api.cluster.patch(LEASES, "lock", {"spec": {"renewTime": objects.timestamp(1_790_000_000)}})
    assert refused.value.code == 400
    with pytest.raises(ClusterError) as refused:
        await api.cluster.patch(LEASES, "lock", {"spec": {"leaseDurationSeconds": 0}})
    assert refused.value.code == 422


async def test_a_lease_may_be_nobodys(api: Api) -> None:
    await api.cluster.create(LEASES, lease())
    freed = await api.cluster.patch(LEASES, "lock", {"spec": {"holderIdentity": "", "leaseDurationSeconds": 1}})
    assert freed["spec"].get("holderIdentity", "") == ""


async def test_an_event_is_checked_and_grows_by_its_series_alone(api: Api) -> None:
    regarding = {"kind": "Deployment", "apiVersion": "apps/v1", "name": "nemo", "namespace": api.namespace}
    created = await api.cluster.create(EVENTS, event(regarding=regarding))
    name = created["metadata"]["name"]
    series = {"count": 2, "lastObservedTime": objects.micro_timestamp(1_790_000_001)}
    assert (await api.cluster.patch(EVENTS, name, {"series": series}))["series"]["count"] == 2
    with pytest.raises(ClusterError) as refused:
        await api.cluster.patch(EVENTS, name, {"note": "3 -> 4"})
    assert refused.value.code == 422
    for wrong in (
        {"note": "x" * 1025},
        {"type": "Grave"},
        {"action": ""},
        {"reason": ""},
        {"reportingInstance": ""},
        {"reportingController": "the autoscaler"},
        {"regarding": {"kind": "Deployment", "name": "nemo"}},
        {"series": {"count": 1, "lastObservedTime": objects.micro_timestamp(1_790_000_001)}},
    ):
        with pytest.raises(ClusterError) as refused:
            await api.cluster.create(EVENTS, event(**({"regarding": regarding} | wrong)))
        assert refused.value.code == 422, wrong


async def test_a_workload_whose_selector_misses_its_pods_is_refused_and_a_selector_stays(api: Api) -> None:
    body = workload()
    body["spec"]["template"]["metadata"] = {"labels": {"app": "other"}}
    with pytest.raises(ClusterError, match="does not match template") as refused:
        await api.cluster.create(DEPLOYMENTS, body)
    assert refused.value.code == 422
    await api.cluster.create(DEPLOYMENTS, workload())
    with pytest.raises(ClusterError) as refused:
        await api.cluster.patch(DEPLOYMENTS, "nemo", {"spec": {"selector": {"matchLabels": {"tier": "1"}}}})
    assert refused.value.code == 422


async def test_a_deletion_cost_is_a_number(api: Api) -> None:
    await api.cluster.create(PODS, pod("a"))
    marked = await api.cluster.patch(PODS, "a", {"metadata": {"annotations": {objects.DELETION_COST: "-1000"}}})
    assert objects.pod(marked).deletion_cost == -1000
    with pytest.raises(ClusterError) as refused:
        await api.cluster.patch(PODS, "a", {"metadata": {"annotations": {objects.DELETION_COST: "cheap"}}})
    assert refused.value.code == 422


# -- who may -------------------------------------------------------------------------------------------------


async def grant(api: Api, *rules: Json) -> str:
    """Token of an account that may do just that."""
    await api.cluster.create(ACCOUNTS, {"metadata": {"name": "operator"}})
    await api.cluster.create(ROLES, {"metadata": {"name": "operator"}, "rules": list(rules)})
    subject = {"kind": "ServiceAccount", "name": "operator", "namespace": api.namespace}
    role = {"apiGroup": ROLES.group, "kind": "Role", "name": "operator"}
    await api.cluster.create(BINDINGS, {"metadata": {"name": "operator"}, "subjects": [subject], "roleRef": role})
    answer = await api.call("POST", api.path(ACCOUNTS, "operator", "token"), {"spec": {}})
    assert answer.code == 201, answer.body
    return str(answer.body["status"]["token"])


async def test_an_account_does_what_its_role_says_and_no_more(api: Api) -> None:
    await api.cluster.create(DEPLOYMENTS, workload())
    await api.cluster.create(STATEFUL_SETS, workload(kind="StatefulSet"))
    await api.cluster.create(LEASES, lease())
    await api.cluster.create(LEASES, lease("other"))
    token = await grant(
        api,
        {"apiGroups": ["apps"], "resources": ["deployments/scale"], "verbs": ["get", "patch"]},
        {"apiGroups": ["apps"], "resources": ["statefulsets"], "verbs": ["get"]},
        {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get"], "resourceNames": ["lock"]},
    )
    for method, path, code in (
        ("GET", api.path(DEPLOYMENTS, "nemo", "scale"), 200),
        ("GET", api.path(DEPLOYMENTS, "nemo"), 403),
        ("PUT", api.path(DEPLOYMENTS, "nemo", "scale"), 403),
        ("GET", api.path(STATEFUL_SETS, "nemo"), 200),
        ("GET", api.path(STATEFUL_SETS, "nemo", "scale"), 403),
        ("GET", api.path(LEASES, "lock"), 200),
        ("GET", api.path(LEASES, "other"), 403),
        ("GET", api.path(LEASES), 403),
        ("GET", api.path(LEASES, "missing"), 403),  # who may not ask is not told whether it is there
    ):
        answer = await api.call(method, path, {} if method == "PUT" else None, token=token)
        assert answer.code == code, (method, path, answer.body)
    refused = await api.call("GET", api.path(DEPLOYMENTS, "nemo"), token=token)
    assert refused.reason == "Forbidden"
    user = f"system:serviceaccount:{api.namespace}:operator"
    said = f'deployments.apps "nemo" is forbidden: User "{user}" cannot get resource "deployments" in API group "apps"'
    assert refused.body["message"].startswith(f'{said} in the namespace "{api.namespace}"')


async def test_a_token_that_nobody_has_is_refused(api: Api) -> None:
    answer = await api.call("GET", api.path(LEASES), token="nonsense")
    assert (answer.code, answer.reason) == (401, "Unauthorized")
