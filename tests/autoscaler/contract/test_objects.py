"""How an API server keeps objects, as the operator depends on it."""

from __future__ import annotations

import pytest

from autoscaler.cluster import objects
from autoscaler.cluster.face import (
    DEPLOYMENTS,
    LEASES,
    PODS,
    QUEUE_AUTOSCALERS,
    STATEFUL_SETS,
    ClusterError,
    Json,
    Kind,
)
from tests.autoscaler.api_under_test import Api
from tests.autoscaler.bodies import lease, pod, scaler, workload

# -- objects -------------------------------------------------------------------------------------------------


async def test_a_new_object_gets_uid_version_generation_and_time(api: Api) -> None:
    created = await api.cluster.create(DEPLOYMENTS, workload())
    meta = created["metadata"]
    assert meta["uid"]
    assert meta["resourceVersion"]
    assert meta["generation"] == 1
    assert objects.seconds(meta["creationTimestamp"])
    assert meta["namespace"] == api.namespace
    assert (await api.cluster.get(DEPLOYMENTS, "nemo"))["metadata"]["uid"] == meta["uid"]


async def test_a_generated_name_begins_as_asked(api: Api) -> None:
    created = await api.cluster.create(LEASES, {"metadata": {"generateName": "lock-"}, "spec": {}})
    assert created["metadata"]["name"].startswith("lock-")
    assert len(created["metadata"]["name"]) == len("lock-") + 5


async def test_what_is_there_is_not_created_again(api: Api) -> None:
    await api.cluster.create(LEASES, lease())
    with pytest.raises(ClusterError, match=r'leases\.coordination\.k8s\.io "lock" already exists') as refused:
        await api.cluster.create(LEASES, lease())
    assert (refused.value.code, refused.value.reason) == (409, "AlreadyExists")


async def test_what_is_not_there_is_not_found(api: Api) -> None:
    with pytest.raises(ClusterError, match=r'deployments\.apps "nemo" not found') as refused:
        await api.cluster.get(DEPLOYMENTS, "nemo")
    assert refused.value.not_found
    answer = await api.call("POST", api.path(LEASES, namespace="no-such-namespace"), lease())
    assert (answer.code, answer.reason) == (404, "NotFound")
    answer = await api.call("GET", f"/apis/apps/v1/namespaces/{api.namespace}/nothings")
    assert answer.code == 404


async def test_a_dry_run_stores_nothing(api: Api) -> None:
    answer = await api.call("POST", api.path(LEASES) + "?dryRun=All", lease())
    assert answer.code == 201
    assert objects.items(await api.cluster.list(LEASES)) == []


# -- versions and generations --------------------------------------------------------------------------------


async def test_each_change_has_a_version_of_its_own_and_no_change_has_none(api: Api) -> None:
    first = await api.cluster.create(LEASES, lease())
    second = await api.cluster.patch(LEASES, "lock", {"spec": {"holderIdentity": "b"}})
    same = await api.cluster.patch(LEASES, "lock", {"spec": {"holderIdentity": "b"}})
    versions = [each["metadata"]["resourceVersion"] for each in (first, second, same)]
    assert versions[0] != versions[1] == versions[2]


async def test_a_stale_put_is_a_conflict(api: Api) -> None:
    first = await api.cluster.create(LEASES, lease())
    await api.cluster.replace(LEASES, "lock", first | lease(holderIdentity="b") | {"metadata": first["metadata"]})
    with pytest.raises(ClusterError, match="the object has been modified") as refused:
        await api.cluster.replace(LEASES, "lock", first)
    assert (refused.value.code, refused.value.reason) == (409, "Conflict")
    assert (await api.cluster.get(LEASES, "lock"))["spec"]["holderIdentity"] == "b"


async def test_a_put_without_a_version_is_taken_of_deployments_and_refused_of_leases_and_custom_resources(
    api: Api,
) -> None:
    await api.cluster.create(DEPLOYMENTS, workload())
    assert (await api.cluster.replace(DEPLOYMENTS, "nemo", workload(replicas=3)))["spec"]["replicas"] == 3
    for kind, body in ((LEASES, lease("nemo")), (QUEUE_AUTOSCALERS, scaler())):
        await api.cluster.create(kind, body)
        with pytest.raises(ClusterError, match="must be specified for an update") as refused:
            await api.cluster.replace(kind, "nemo", body)
        assert refused.value.code == 422


async def test_a_put_creates_a_lease_and_nothing_else(api: Api) -> None:
    answer = await api.call("PUT", api.path(LEASES, "lock"), lease())
    assert answer.code == 201
    answer = await api.call("PUT", api.path(DEPLOYMENTS, "nemo"), workload())
    assert answer.code == 404


async def test_a_patch_that_names_a_stale_version_is_a_conflict(api: Api) -> None:
    first = await api.cluster.create(LEASES, lease())
    named = {"metadata": {"resourceVersion": first["metadata"]["resourceVersion"]}}
    second = await api.cluster.patch(LEASES, "lock", named | {"spec": {"holderIdentity": "b"}})
    assert second["spec"]["holderIdentity"] == "b"
    with pytest.raises(ClusterError) as refused:
        await api.cluster.patch(LEASES, "lock", named | {"spec": {"holderIdentity": "c"}})
    assert (refused.value.code, refused.value.reason) == (409, "Conflict")
    assert (await api.cluster.patch(LEASES, "lock", {"spec": {"holderIdentity": "d"}}))["spec"]["holderIdentity"] == "d"


async def test_what_means_another_object_of_the_same_name_is_refused(api: Api) -> None:
    other = {"uid": "11111111-1111-1111-1111-111111111111"}
    created = await api.cluster.create(LEASES, lease())
    with pytest.raises(ClusterError) as refused:
        await api.cluster.replace(LEASES, "lock", created | {"metadata": created["metadata"] | other})
    assert refused.value.conflict
    with pytest.raises(ClusterError) as refused:
        await api.cluster.patch(LEASES, "lock", {"metadata": other, "spec": {"holderIdentity": "b"}})
    assert (refused.value.code, refused.value.reason) == (422, "Invalid")


async def test_a_generation_counts_changes_of_what_is_wanted_alone(api: Api) -> None:
    await api.cluster.create(QUEUE_AUTOSCALERS, scaler())
    labelled = await api.cluster.patch(QUEUE_AUTOSCALERS, "nemo", {"metadata": {"labels": {"a": "b"}}})
    assert labelled["metadata"]["generation"] == 1
    seen = await api.cluster.patch(QUEUE_AUTOSCALERS, "nemo", {"status": {"desired": 2}}, "status")
    assert seen["metadata"]["generation"] == 1
    changed = await api.cluster.patch(QUEUE_AUTOSCALERS, "nemo", {"spec": {"maxReplicas": 5}})
    assert changed["metadata"]["generation"] == 2


# -- status and scale ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "body"), [(DEPLOYMENTS, workload()), (QUEUE_AUTOSCALERS, scaler())])
async def test_status_and_spec_change_each_through_its_own_door(api: Api, kind: Kind, body: Json) -> None:
    field = "maxReplicas" if kind is QUEUE_AUTOSCALERS else "replicas"
    before = (await api.cluster.create(kind, body | {"status": {"replicas": 7}}))["spec"][field]
    assert (await api.cluster.get(kind, "nemo")).get("status", {}).get("replicas") != 7
    patch = {"spec": {field: 9}, "status": {"replicas": 8, "observedGeneration": 1}}
    by_status = await api.cluster.patch(kind, "nemo", patch, "status")
    assert (by_status["spec"][field], by_status["status"]["replicas"]) == (before, 8)
    by_spec = await api.cluster.patch(kind, "nemo", {"spec": {field: 9}, "status": {"replicas": 7}})
    assert by_spec["spec"][field] == 9
    assert by_spec["status"]["replicas"] != 7


async def test_kinds_without_a_subresource_have_none(api: Api) -> None:
    await api.cluster.create(LEASES, lease())
    for subresource in ("status", "scale"):
        assert (await api.call("GET", api.path(LEASES, "lock", subresource))).code == 404


@pytest.mark.parametrize("kind", [DEPLOYMENTS, STATEFUL_SETS])
async def test_a_workload_is_scaled_by_its_subresource(api: Api, kind: Kind) -> None:
    await api.cluster.create(kind, workload(kind="Deployment" if kind is DEPLOYMENTS else "StatefulSet"))
    found = await api.cluster.get(kind, "nemo", "scale")
    assert (found["kind"], found["apiVersion"]) == ("Scale", "autoscaling/v1")
    assert objects.scale(found).replicas == 2
    assert objects.scale(found).selector == "app=nemo"

    patched = await api.cluster.patch(kind, "nemo", {"spec": {"replicas": 3}}, "scale")
    assert (patched["kind"], patched["spec"]) == ("Scale", {"replicas": 3})
    put = await api.call(
        "PUT", api.path(kind, "nemo", "scale"), patched | {"metadata": {"name": "nemo"}, "spec": {"replicas": 4}}
    )
    assert put.code == 200
    workload_now = await api.cluster.get(kind, "nemo")
    assert workload_now["spec"]["replicas"] == 4
    assert workload_now["metadata"]["generation"] == 3
    assert workload_now["spec"]["template"]["spec"]["containers"][0]["name"] == "server"


async def test_a_scale_of_zero_has_no_replicas_in_it(api: Api) -> None:
    await api.cluster.create(DEPLOYMENTS, workload())
    await api.cluster.patch(DEPLOYMENTS, "nemo", {"spec": {"replicas": 0}}, "scale")
    found = await api.cluster.get(DEPLOYMENTS, "nemo", "scale")
    assert "replicas" not in found["spec"]
    assert objects.scale(found).replicas == 0


async def test_a_stale_or_negative_scale_is_refused(api: Api) -> None:
    await api.cluster.create(DEPLOYMENTS, workload())
    stale = objects.scale(await api.cluster.get(DEPLOYMENTS, "nemo", "scale"))
    await api.cluster.patch(DEPLOYMENTS, "nemo", {"spec": {"replicas": 3}})
    with pytest.raises(ClusterError) as refused:
        await api.cluster.patch(DEPLOYMENTS, "nemo", objects.scale_patch(stale, 1), "scale")
    assert (refused.value.code, refused.value.reason) == (409, "Conflict")
    with pytest.raises(ClusterError) as refused:
        await api.cluster.patch(DEPLOYMENTS, "nemo", {"spec": {"replicas": -1}}, "scale")
    assert refused.value.code == 422
    assert (await api.cluster.get(DEPLOYMENTS, "nemo"))["spec"]["replicas"] == 3


async def test_a_custom_resource_is_scaled_at_the_paths_of_its_definition(api: Api) -> None:
    await api.cluster.create(QUEUE_AUTOSCALERS, scaler())
    with pytest.raises(ClusterError, match="does not exist") as refused:
        await api.cluster.get(QUEUE_AUTOSCALERS, "nemo", "scale")
    assert refused.value.code == 500
    patched = await api.cluster.patch(QUEUE_AUTOSCALERS, "nemo", {"spec": {"replicas": 3}}, "scale")
    assert patched["spec"] == {"replicas": 3}
    await api.cluster.patch(QUEUE_AUTOSCALERS, "nemo", {"status": {"replicas": 2, "selector": "app=nemo"}}, "status")
    found = await api.cluster.get(QUEUE_AUTOSCALERS, "nemo", "scale")
    assert objects.scale(found) == objects.Scale(3, 2, "app=nemo", found["metadata"]["resourceVersion"])
    assert (await api.cluster.get(QUEUE_AUTOSCALERS, "nemo"))["spec"]["replicas"] == 3


# -- patches -------------------------------------------------------------------------------------------------


async def test_a_merge_patch_replaces_lists_and_removes_what_is_null(api: Api) -> None:
    body = workload()
    body["metadata"]["annotations"] = {"keep": "1", "drop": "2"}
    await api.cluster.create(DEPLOYMENTS, body)
    container = {"name": "other", "image": "nowhere.invalid/other"}
    patch = {
        "metadata": {"annotations": {"drop": None}},
        "spec": {"template": {"spec": {"containers": [container]}}},
    }
    patched = await api.cluster.patch(DEPLOYMENTS, "nemo", patch)
    assert "drop" not in patched["metadata"]["annotations"]
    assert [each["name"] for each in patched["spec"]["template"]["spec"]["containers"]] == ["other"]


async def test_a_strategic_patch_merges_containers_by_name(api: Api) -> None:
    await api.cluster.create(DEPLOYMENTS, workload())
    for container in (
        {"name": "server", "env": [{"name": "A", "value": "1"}]},
        {"name": "other", "image": "x.invalid/y"},
    ):
        patch = {"spec": {"template": {"spec": {"containers": [container]}}}}
        answer = await api.patch(api.path(DEPLOYMENTS, "nemo"), patch, "strategic-merge-patch")
        assert answer.code == 200, answer.body
    found = {each["name"]: each for each in answer.body["spec"]["template"]["spec"]["containers"]}
    assert set(found) == {"server", "other"}
    assert found["server"]["image"] == "nowhere.invalid/server"
    assert found["server"]["env"] == [{"name": "A", "value": "1"}]
    drop = {"spec": {"template": {"spec": {"containers": [{"name": "other", "$patch": "delete"}]}}}}
    answer = await api.patch(api.path(DEPLOYMENTS, "nemo"), drop, "strategic-merge-patch")
    assert [each["name"] for each in answer.body["spec"]["template"]["spec"]["containers"]] == ["server"]


async def test_a_custom_resource_has_no_strategic_patch(api: Api) -> None:
    await api.cluster.create(QUEUE_AUTOSCALERS, scaler())
    answer = await api.patch(api.path(QUEUE_AUTOSCALERS, "nemo"), {"spec": {}}, "strategic-merge-patch")
    assert (answer.code, answer.reason) == (415, "UnsupportedMediaType")


async def test_a_json_patch_is_done_whole_or_not_at_all(api: Api) -> None:
    await api.cluster.create(LEASES, lease())
    path = api.path(LEASES, "lock")
    replace = {"op": "replace", "path": "/spec/holderIdentity", "value": "b"}
    answer = await api.patch(
        path, [replace, {"op": "test", "path": "/spec/leaseDurationSeconds", "value": 1}], "json-patch"
    )
    assert answer.code == 422
    assert (await api.cluster.get(LEASES, "lock"))["spec"]["holderIdentity"] == "a"
    label = {"op": "add", "path": "/metadata/labels", "value": {"a/b": "c"}}
    answer = await api.patch(path, [replace, label, {"op": "remove", "path": "/metadata/labels/a~1b"}], "json-patch")
    assert (answer.code, answer.body["spec"]["holderIdentity"]) == (200, "b")
    assert not answer.body["metadata"].get("labels")


# -- the end of objects --------------------------------------------------------------------------------------


async def test_a_deletion_may_name_what_it_means(api: Api) -> None:
    created = await api.cluster.create(LEASES, lease())
    other = {"preconditions": {"uid": "11111111-1111-1111-1111-111111111111"}}
    assert (await api.call("DELETE", api.path(LEASES, "lock"), other)).code == 409
    same = {"preconditions": {"uid": created["metadata"]["uid"]}}
    answer = await api.call("DELETE", api.path(LEASES, "lock"), same)
    assert (answer.code, answer.body["status"]) == (200, "Success")
    assert (await api.call("DELETE", api.path(LEASES, "lock"))).code == 404


async def test_a_finalizer_keeps_an_object_until_it_is_taken_off(api: Api) -> None:
    body = scaler() | {"metadata": {"name": "nemo", "finalizers": ["nemoserve.dev/test"]}}
    await api.cluster.create(QUEUE_AUTOSCALERS, body)
    assert (await api.call("DELETE", api.path(QUEUE_AUTOSCALERS, "nemo"))).code == 200
    assert (await api.cluster.get(QUEUE_AUTOSCALERS, "nemo"))["metadata"]["deletionTimestamp"]
    await api.cluster.patch(QUEUE_AUTOSCALERS, "nemo", {"metadata": {"finalizers": None}})
    with pytest.raises(ClusterError) as refused:
        await api.cluster.get(QUEUE_AUTOSCALERS, "nemo")
    assert refused.value.not_found


async def test_a_pod_that_no_node_has_is_gone_at_once(api: Api) -> None:
    await api.cluster.create(PODS, pod("a"))
    assert (await api.call("DELETE", api.path(PODS, "a"))).code == 200
    assert (await api.call("GET", api.path(PODS, "a"))).code == 404
