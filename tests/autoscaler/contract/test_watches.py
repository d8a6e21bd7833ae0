"""What an API server lists and what it tells of changes, as the operator depends on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from autoscaler.cluster import objects
from autoscaler.cluster.face import LEASES, PODS, QUEUE_AUTOSCALERS, ClusterError, WatchEvent
from tests.autoscaler.api_under_test import Api
from tests.autoscaler.bodies import lease, pod, scaler


async def taken(watch: AsyncIterator[WatchEvent]) -> list[WatchEvent]:
    """All of a watch, until the server ends it."""
    return [event async for event in watch]


# -- selectors and lists -------------------------------------------------------------------------------------


async def test_a_list_is_filtered_by_labels_and_fields(api: Api) -> None:
    for name, labels in (("a", {"app": "x", "tier": "1"}), ("b", {"app": "x"}), ("c", {"app": "y"})):
        await api.cluster.create(LEASES, lease(name) | {"metadata": {"name": name, "labels": labels}})
    wanted = {
        "": "abc",
        "app=x": "ab",
        "app==x,tier=1": "a",
        "app!=x": "c",
        "app in (x, y)": "abc",
        "tier notin (1)": "bc",
        "tier": "a",
        "!tier": "bc",
        "app=z": "",
    }
    for selector, names in wanted.items():
        found = objects.items(await api.cluster.list(LEASES, selector))
        assert "".join(each["metadata"]["name"] for each in found) == names, selector
    answer = await api.call("GET", api.path(LEASES) + "?fieldSelector=metadata.name%3Db")
    assert [each["metadata"]["name"] for each in answer.body["items"]] == ["b"]
    answer = await api.call("GET", api.path(LEASES) + "?fieldSelector=spec.holderIdentity%3Da")
    assert answer.code == 400
    assert (await api.call("GET", api.path(LEASES) + "?labelSelector=a%20b%20c")).code == 400


async def test_items_of_a_typed_list_have_no_kind(api: Api) -> None:
    await api.cluster.create(LEASES, lease())
    await api.cluster.create(QUEUE_AUTOSCALERS, scaler())
    listed = await api.cluster.list(LEASES)
    assert (listed["kind"], listed["apiVersion"]) == ("LeaseList", "coordination.k8s.io/v1")
    assert "kind" not in listed["items"][0]
    assert (await api.cluster.list(QUEUE_AUTOSCALERS))["items"][0]["kind"] == "QueueAutoscaler"


# -- watches -------------------------------------------------------------------------------------------------


async def test_a_watch_goes_on_from_a_list_and_ends_when_its_time_is_over(api: Api) -> None:
    await api.cluster.create(LEASES, lease("before"))
    version = (await api.cluster.list(LEASES))["metadata"]["resourceVersion"]
    await api.cluster.create(LEASES, lease("after"))
    await api.cluster.patch(LEASES, "after", {"spec": {"holderIdentity": "b"}})
    await api.call("DELETE", api.path(LEASES, "after"))
    events = await taken(api.cluster.watch(LEASES, version))
    seen = [(each.type, each.object["metadata"]["name"]) for each in events if each.type != "BOOKMARK"]
    assert seen == [("ADDED", "after"), ("MODIFIED", "after"), ("DELETED", "after")]
    versions = [int(each.object["metadata"]["resourceVersion"]) for each in events]
    assert versions == sorted(versions)
    assert versions[0] > int(version)


async def test_a_watch_sees_what_happens_while_it_lasts(api: Api) -> None:
    version = (await api.cluster.list(LEASES))["metadata"]["resourceVersion"]
    watching = asyncio.ensure_future(anext(aiter(api.cluster.watch(LEASES, version))))
    await api.cluster.create(LEASES, lease())
    while (event := await watching).type == "BOOKMARK":  # on a slow machine
        watching = asyncio.ensure_future(anext(aiter(api.cluster.watch(LEASES, version))))
    assert (event.type, event.object["metadata"]["name"]) == ("ADDED", "lock")
    assert event.object["kind"] == "Lease"


async def test_a_bookmark_tells_a_version_to_go_on_from(api: Api) -> None:
    version = (await api.cluster.list(LEASES))["metadata"]["resourceVersion"]
    await api.cluster.create(QUEUE_AUTOSCALERS, scaler())
    events = await taken(api.cluster.watch(LEASES, version))
    assert {each.type for each in events} == {"BOOKMARK"}
    assert events[0].object["kind"] == "Lease"
    await api.cluster.create(LEASES, lease())
    again = await taken(api.cluster.watch(LEASES, events[-1].object["metadata"]["resourceVersion"]))
    assert [each.type for each in again if each.type != "BOOKMARK"] == ["ADDED"]


async def test_what_ceases_to_match_a_watch_is_deleted_from_it_and_what_begins_to_is_added(api: Api) -> None:
    await api.cluster.create(PODS, pod("a", serves="nemo"))
    version = (await api.cluster.list(PODS, "serves=nemo"))["metadata"]["resourceVersion"]
    await api.cluster.patch(PODS, "a", {"metadata": {"labels": {"serves": None}}})
    await api.cluster.patch(PODS, "a", {"metadata": {"labels": {"other": "1"}}})
    await api.cluster.patch(PODS, "a", {"metadata": {"labels": {"serves": "nemo"}}})
    events = [each for each in await taken(api.cluster.watch(PODS, version, "serves=nemo")) if each.type != "BOOKMARK"]
    assert [each.type for each in events] == ["DELETED", "ADDED"]


async def test_a_watch_from_too_long_ago_has_expired(api: Api) -> None:
    await api.cluster.create(LEASES, lease())
    with pytest.raises(ClusterError) as refused:
        await taken(api.cluster.watch(LEASES, "1"))
    assert refused.value.expired
    assert refused.value.reason == "Expired"


async def test_a_watch_that_cannot_be_is_refused_before_it_begins(api: Api) -> None:
    for wrong in ("resourceVersion=new", "labelSelector=a%20b%20c", "fieldSelector=spec.holderIdentity%3Da"):
        answer = await api.call("GET", api.path(LEASES) + f"?watch=true&timeoutSeconds=1&{wrong}")
        assert (answer.code, answer.reason) == (400, "BadRequest"), wrong


async def test_a_version_of_the_future_is_refused(api: Api) -> None:
    version = int((await api.cluster.list(LEASES))["metadata"]["resourceVersion"]) + 1_000_000_000
    answer = await api.call("GET", api.path(LEASES) + f"?resourceVersion={version}")
    assert (answer.code, answer.reason) == (504, "Timeout")
