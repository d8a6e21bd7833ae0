"""One look at all replicas of a workload, in parallel, and what is remembered between two looks.

Of the phase both sides know a part. The cluster knows of pods without a node, without a process, or that are to go; a
server knows that it loads, drains or has failed. Where they differ the server is right about itself, for it is asked
now; the cluster is right about what is to end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from autoscaler.cluster.objects import Pod
from autoscaler.fleet import Load, Phase, Replica
from autoscaler.observe.answers import Answer, Totals
from autoscaler.observe.secrets import Secrets
from autoscaler.observe.servers import Address, Servers, SilentError
from autoscaler.settings import Settings

log = logging.getLogger(__name__)

SECONDS = 1.0  # that one server has for an answer, by each way
LOOK_SECONDS = 2.5  # that all have together
LONGEST_START = 3600.0  # from creation to ready
# Nothing answers in other phases. Where a server may serve, metrics are asked for if GetLoad fails.
ASKED, SERVING = (Phase.STARTING, Phase.READY, Phase.DRAINING), (Phase.READY, Phase.DRAINING)


class Sought(Protocol):
    """What a look needs of a resource's spec (`autoscaler.resource.Spec`)."""

    @property
    def settings(self) -> Settings: ...

    @property
    def grpc_port(self) -> int: ...

    @property
    def metrics_port(self) -> int: ...


@dataclass(slots=True)
class _Memory:
    """Of a pod."""

    answer: Answer | None = None
    load: Load | None = None
    observed_at: float = 0.0
    ready_at: float | None = None
    restarts: int = 0  # of its containers, when it answered
    complaint: str = ""  # why it did not answer last
    totals: Totals = field(default_factory=Totals)


class Observer:
    """Of one workload. `look` is never called twice at the same time; `close` it in the end.

    Args:
        seconds, look_seconds: limits, of one answer and of the whole look.

    Raises:
        OSError, ValueError: the secrets cannot be read.
    """

    def __init__(
        self, secrets: Secrets | None = None, *, seconds: float = SECONDS, look_seconds: float = LOOK_SECONDS
    ) -> None:
        self._servers = Servers(secrets or Secrets(), seconds)
        self._look_seconds = look_seconds
        self._memories: dict[str, _Memory] = {}  # by uid
        self._unread = ""  # why secrets cannot be read

    async def look(self, pods: Sequence[Pod], spec: Sought, at: float) -> tuple[Replica, ...]:
        """Of each pod, in their order. One that does not answer keeps its last load, which grows old.

        Args:
            at: now, Unix seconds.
        """
        addresses = {
            each.uid: Address(each.uid, each.ip, spec.grpc_port, spec.metrics_port)
            for each in pods
            if each.ip is not None and each.phase in ASKED
        }
        try:
            await self._servers.prepare(frozenset(addresses.values()))
            self._unread = ""
        except (OSError, ValueError) as error:
            if str(error) != self._unread:
                self._unread = str(error)
                log.error("secrets stay as they were", extra={"reason": self._unread})
        answers = await self._ask({each.uid: each for each in pods}, addresses)
        self._memories = {
            each.uid: self._memories.get(each.uid) or _Memory(ready_at=_ready_before(each)) for each in pods
        }
        return tuple(self._replica(each, answers.get(each.uid), spec.settings, at) for each in pods)

    async def close(self) -> None:
        await self._servers.close()

    async def _ask(
        self, pods: Mapping[str, Pod], addresses: Mapping[str, Address]
    ) -> Mapping[str, Answer | SilentError]:
        tasks = {
            uid: asyncio.create_task(self._servers.ask(address, text=pods[uid].phase in SERVING))
            for uid, address in addresses.items()
        }
        if not tasks:
            return {}
        try:
            await asyncio.wait(tasks.values(), timeout=self._look_seconds)
        finally:
            late = [each for each in tasks.values() if not each.done()]
            for each in late:
                each.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
        return {uid: self._result(task) for uid, task in tasks.items()}

    def _result(self, task: asyncio.Task[Answer]) -> Answer | SilentError:
        if task.cancelled():
            return SilentError(f"no answer within the {self._look_seconds:g} s of a look")
        error = task.exception()
        if error is None:
            return task.result()
        if not isinstance(error, SilentError):  # a fault of ours, which is to stop no other replica
            log.error("a replica could not be asked", exc_info=error)
            return SilentError(f"{type(error).__name__}: {error}")
        return error

    def _replica(self, pod: Pod, found: Answer | SilentError | None, settings: Settings, at: float) -> Replica:
        memory = self._memories[pod.uid]
        self._complain(pod, memory, str(found) if isinstance(found, SilentError) else "")
        if isinstance(found, Answer):
            counters, waits, gaps = memory.totals.add(found)
            late, slow = waits.longer_than(settings.target.ttft_seconds), gaps.longer_than(settings.target.itl_seconds)
            counters = replace(counters, late_first_tokens=late, slow_requests=slow)
            memory.load = replace(found.load, counters=counters)
            memory.answer, memory.observed_at, memory.restarts = found, at, pod.restarts
        phase, eta = _phase(pod, memory, heard=isinstance(found, Answer), at=at)
        if phase is Phase.READY and memory.ready_at is None:
            memory.ready_at = at if pod.ready_since is None else pod.ready_since
        return Replica(
            name=pod.name,
            phase=phase,
            created_at=pod.created_at,
            load=memory.load,
            observed_at=memory.observed_at,
            ready_at=memory.ready_at,
            unschedulable_since=pod.unschedulable_since,
            eta_seconds=eta,
        )

    def _complain(self, pod: Pod, memory: _Memory, complaint: str) -> None:
        """Once for as long as a replica that should answer does not."""
        if pod.phase not in SERVING:
            complaint = ""
        if complaint and not memory.complaint:
            log.warning("a replica is silent", extra={"pod": pod.name, "reason": complaint})
        elif memory.complaint and not complaint:
            log.info("a replica is not silent any more", extra={"pod": pod.name})
        memory.complaint = complaint


def _ready_before(pod: Pod) -> float | None:
    """When a pod that is met in the middle of its life was ready first; None: it was not. The cluster says when it was
    so last, which is the same if it never went back in between; where it may have, its creation stands for a time that
    nobody knows, and that is not to be taken for a long start."""
    since = pod.ready_since
    if since is not None and not pod.restarts and since - pod.created_at <= LONGEST_START:
        return since
    return pod.created_at if since is not None or pod.restarts or pod.came_up else None


def _phase(pod: Pod, memory: _Memory, *, heard: bool, at: float) -> tuple[Phase, float | None]:
    """And the seconds until it is ready, where it says so."""
    said = memory.answer.phase if memory.answer is not None else None
    if pod.phase not in (Phase.STARTING, Phase.READY) or said is None:
        return pod.phase, None
    if heard:
        return said, memory.answer.eta_seconds if memory.answer is not None else None
    # A server may be too busy to answer anybody, the kubelet included; one that began anew is another one.
    if pod.phase is Phase.STARTING and said in (Phase.LOADING, *SERVING) and memory.restarts == pod.restarts:
        eta = memory.answer.eta_seconds if memory.answer is not None else None
        return said, None if eta is None else max(0.0, eta - (at - memory.observed_at))
    return pod.phase, None
