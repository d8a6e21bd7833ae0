"""Which replicas go, and the steps on the way there: pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.cluster.objects import Pod, Scale
from autoscaler.controller.drain import DOOMED, DRAINING, SETTLE, TEMPLATE, Plan, Scene, plan
from autoscaler.controller.victims import choose
from autoscaler.fleet import Load, Phase, Replica
from autoscaler.resource import TargetRef

NOW = 1_000_000.0
LIMIT = 300.0


def replica(
    name: str, phase: Phase = Phase.READY, running: int = 0, *, age: float = 100.0, seen: float = 0.0
) -> Replica:
    """`seen`: seconds ago."""
    load = Load(running_requests=running) if phase in (Phase.READY, Phase.DRAINING) else None
    return Replica(name, phase, created_at=NOW - age, load=load, observed_at=NOW - seen)


def scene(
    asked: int, replicas: Sequence[Replica], since: dict[str, float] | None = None, *, kind: str = "Deployment"
) -> Scene:
    """`since`: of those that drain, seconds ago."""
    marks = {name: {DRAINING: f"{NOW - ago:.3f}"} for name, ago in (since or {}).items()}
    pods = {
        each.name: Pod(
            name=each.name,
            uid=each.name,
            resource_version="1",
            phase=each.phase,
            holds_place=True,
            created_at=each.created_at,
            labels=marks.get(each.name, {}),
        )
        for each in replicas
    }
    seen = [replace(each, phase=Phase.DRAINING) if each.name in marks else each for each in replicas]
    return Scene(
        at=NOW,
        target=TargetRef("apps/v1", kind, "nemo"),
        scale=Scale(asked, len(replicas), "app=nemo", "7"),
        pods=pods,
        replicas=tuple(seen),
        others=(),
        draining={name: NOW - ago for name, ago in (since or {}).items()},
        fresh_since=NOW - 15,
    )


def order(*replicas: Replica, ordered: bool = False) -> list[str]:
    chosen = choose(replicas, len(replicas), fresh_since=NOW - 15, ordered=ordered)
    return [each.name for each in chosen]


def test_what_serves_nobody_goes_first_then_what_drains_then_the_idlest() -> None:
    fleet = [
        replica("busy", running=9),
        replica("idle", running=1),
        replica("draining", Phase.DRAINING, running=5),
        replica("loading", Phase.LOADING),
        replica("failed", Phase.FAILED),
        replica("starting", Phase.STARTING),
        replica("pending", Phase.PENDING),
    ]
    assert order(*fleet) == ["pending", "starting", "failed", "loading", "draining", "idle", "busy"]


def test_of_two_that_are_as_idle_the_newer_goes() -> None:
    assert order(replica("old", age=900), replica("new", age=60)) == ["new", "old"]


def test_who_has_not_been_heard_of_lately_counts_as_the_busiest() -> None:
    assert order(replica("silent", seen=16), replica("busy", running=30)) == ["busy", "silent"]


def test_a_stateful_set_takes_the_highest_ordinals() -> None:
    fleet = [replica("nemo-2", running=3), replica("nemo-10", running=9), replica("nemo-0")]
    assert order(*fleet, ordered=True) == ["nemo-10", "nemo-2", "nemo-0"]


def test_one_that_serves_and_is_not_ready_to_the_cluster_drains_first_as_that_deletes_it_first() -> None:
    here = scene(3, [replica("idle"), replica("draining"), replica("overloaded", running=30, seen=20)], {"draining": 5})
    here = replace(here, pods=here.pods | {"overloaded": replace(here.pods["overloaded"], phase=Phase.STARTING)})
    assert plan(here, 2, LIMIT) == Plan(3, keep=("draining",), drain=("overloaded",))


def test_more_are_asked_for_at_once_and_who_drains_serves_again() -> None:
    fleet = [replica("a"), replica("b")]
    assert plan(scene(2, fleet, {"b": 5}), 4, LIMIT) == Plan(4, keep=("b",))


def test_one_that_serves_drains_first_and_is_asked_for_until_it_has() -> None:
    fleet = [replica("a", running=2), replica("b", running=1)]
    assert plan(scene(2, fleet), 1, LIMIT) == Plan(2, drain=("b",))


def test_who_has_drained_goes_even_if_another_one_is_idler_now() -> None:
    fleet = [replica("a"), replica("b")]
    assert plan(scene(2, fleet, {"b": 5}), 1, LIMIT) == Plan(1, doomed={"b": "idle"})


def test_nothing_is_believed_before_the_endpoints_have_spread() -> None:
    assert plan(scene(1, [replica("a")], {"a": 2}), 0, LIMIT) == Plan(1)


def test_a_look_from_before_says_nothing() -> None:
    assert plan(scene(1, [replica("a", seen=4)], {"a": 5}), 0, LIMIT) == Plan(1)


def test_one_that_never_gets_idle_goes_at_the_limit() -> None:
    fleet = [replica("a", running=5)]
    assert plan(scene(1, fleet, {"a": 299}), 0, LIMIT) == Plan(1)
    assert plan(scene(1, fleet, {"a": 300}), 0, LIMIT) == Plan(0, doomed={"a": "limit"})


def rolling(here: Scene, *new: str) -> Scene:
    """These pods are of another template than the others."""
    labelled = {
        name: replace(pod, labels={**pod.labels, TEMPLATE: str(name in new)}) for name, pod in here.pods.items()
    }
    return replace(here, pods=labelled)


def test_while_a_deployment_rolls_out_none_goes_and_none_begins_to_drain() -> None:
    fleet = [replica("old"), replica("new", Phase.LOADING), replica("drained")]
    here = rolling(scene(2, fleet, {"drained": 9}), "new")
    assert here.rolls_out
    assert plan(here, 1, LIMIT) == Plan(2)
    assert plan(here, 0, LIMIT) == Plan(2)
    assert plan(here, 2, LIMIT) == Plan(2, keep=("drained",))
    assert plan(here, 3, LIMIT) == Plan(3, keep=("drained",))
    over = rolling(here, "old", "new", "drained")
    assert not over.rolls_out
    assert plan(over, 0, LIMIT) == Plan(0, doomed={"new": "free", "drained": "idle"})


def test_a_stateful_set_that_rolls_out_still_ends_its_highest_ordinals() -> None:
    here = rolling(scene(2, [replica("nemo-0"), replica("nemo-1")], {"nemo-1": 9}, kind="StatefulSet"), "nemo-1")
    assert plan(here, 1, LIMIT) == Plan(1, doomed={"nemo-1": "idle"})


def test_what_has_not_even_been_made_goes_before_all_else() -> None:
    assert plan(scene(4, [replica("a"), replica("b", Phase.PENDING)]), 2, LIMIT) == Plan(2)


def test_a_free_one_lets_one_that_drains_serve_again() -> None:
    fleet = [replica("a", running=2), replica("b", Phase.LOADING)]
    assert plan(scene(2, fleet, {"a": 9}), 1, LIMIT) == Plan(1, keep=("a",), doomed={"b": "free"})


def test_one_that_was_to_go_and_stays_costs_as_much_as_all_others_again() -> None:
    here = scene(2, [replica("a", running=2), replica("b")])
    here = replace(here, pods=here.pods | {"a": replace(here.pods["a"], deletion_cost=DOOMED)})
    assert plan(here, 2, LIMIT) == Plan(2, keep=("a",))


def test_of_a_stateful_set_none_goes_before_those_above_it() -> None:
    fleet = [replica("nemo-0"), replica("nemo-1"), replica("nemo-2", running=3)]
    here = scene(3, fleet, {"nemo-1": 9, "nemo-2": 9}, kind="StatefulSet")
    assert plan(here, 1, LIMIT) == Plan(3)


fleets = st.lists(
    st.builds(
        lambda phase, running, age, seen: (phase, running, age, seen),
        st.sampled_from([each for each in Phase if each is not Phase.DRAINING]),
        st.integers(0, 3),
        st.floats(0, 500),
        st.floats(0, 30),
    ),
    max_size=8,
)


@given(
    fleet=fleets,
    extra=st.integers(-2, 3),
    desired=st.integers(0, 10),
    marked=st.sets(st.integers(0, 7)),
    data=st.data(),
)
@pytest.mark.parametrize("kind", ["Deployment", "StatefulSet"])
def test_whatever_there_is_the_steps_lead_there_and_no_replica_is_lost_for_nothing(
    kind: str,
    fleet: list[tuple[Phase, int, float, float]],
    extra: int,
    desired: int,
    marked: set[int],
    data: st.DataObject,
) -> None:
    replicas = [
        replica(f"nemo-{number}", phase, running, age=age, seen=seen)
        for number, (phase, running, age, seen) in enumerate(fleet)
    ]
    since = {each.name: data.draw(st.floats(0, 400)) for number, each in enumerate(replicas) if number in marked}
    asked = max(0, len(replicas) + extra)
    here = scene(asked, replicas, since, kind=kind)
    steps = plan(here, desired, LIMIT)
    if desired >= asked:
        assert steps.asked == desired
        assert steps.drain == ()
        assert set(steps.keep) == set(since)
        return
    assert desired <= steps.asked <= asked
    groups = [set(steps.keep), set(steps.drain), set(steps.doomed)]
    assert sum(map(len, groups)) == len(set().union(*groups))  # nobody is treated twice
    # After the steps exactly as many are not on their way out as there should be.
    leaving = (set(since) - set(steps.keep) - set(steps.doomed)) | set(steps.drain)
    assert steps.asked - len(leaving) == desired
    # Nobody who serves goes before a drain has had its time to be seen.
    serving = {each.name for each in here.replicas if each.phase in (Phase.READY, Phase.DRAINING)}
    assert all(since.get(name, 0.0) >= SETTLE for name in steps.doomed if name in serving)
