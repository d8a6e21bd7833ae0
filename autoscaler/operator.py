"""The operator's process: its parts put together, its ports, its end."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import uuid4

from autoscaler.activator import Activator, ActivatorSettings
from autoscaler.activator.http_server import HttpServer
from autoscaler.clock import SystemClock
from autoscaler.cluster.client import connect
from autoscaler.cluster.face import Cluster
from autoscaler.controller import Controller
from autoscaler.drain import DrainTimes
from autoscaler.events import Recorder
from autoscaler.front import Front
from autoscaler.lease import FencedCluster, Lease, LeaseTimes
from autoscaler.metrics import Metrics
from autoscaler.policy import QueuePolicy
from autoscaler.probes import create_app
from autoscaler.reconcile import Observer, Reconciler, Tools
from autoscaler.tend import Tender

log = logging.getLogger(__name__)

GRACE_SECONDS = 5.0  # of the metrics port


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorSettings:
    """Attributes:
    kubeconfig, namespace: see `autoscaler.cluster.client.connect`.
    names: of the resources to look after; none: all of the namespace.
    activate: name of the resource whose workload's requests are held here while it has no replica.
    stop_seconds: that answers of the activator may take once this process is told to end.
    """

    kubeconfig: str | None = None
    namespace: str | None = None
    names: frozenset[str] = frozenset()
    lease_name: str = "nemoserve-autoscaler"
    pod_name: str = "nemoserve-autoscaler"
    metrics_address: str = "0.0.0.0:9090"
    activate: str | None = None
    activator: ActivatorSettings = field(default_factory=ActivatorSettings)
    stop_seconds: float = 25.0
    lease_times: LeaseTimes = field(default_factory=LeaseTimes)
    drain_times: DrainTimes = field(default_factory=DrainTimes)


async def run(settings: OperatorSettings, observer: Callable[[], Observer]) -> None:
    """Until SIGTERM or SIGINT.

    Args:
        observer: makes the one of a resource.

    Raises:
        ClusterError: there is no usable configuration of a cluster.
        OSError: a port cannot be opened.
    """
    stop = asyncio.Event()
    loop, signals = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    try:
        async with connect(settings.kubeconfig, namespace=settings.namespace) as cluster:
            activator = Activator(settings.activator) if settings.activate is not None else None
            if activator is not None:
                await activator.start()
            try:
                front = _front(settings, activator)
                await _control(_controller(settings, cluster, front, observer), settings, stop)
            finally:
                if activator is not None:
                    await activator.stop(settings.stop_seconds)
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def _front(settings: OperatorSettings, activator: Activator | None) -> Front | None:
    if activator is None or settings.activate is None:
        return None
    return Front(settings.activate, settings.pod_name, activator.room)


async def _control(made: tuple[Controller, Metrics], settings: OperatorSettings, stop: asyncio.Event) -> None:
    controller, metrics = made
    probes = HttpServer(
        create_app(metrics.registry, ready=lambda: controller.ready, leads=lambda: controller.leads),
    )
    port = await probes.start(settings.metrics_address)
    log.info("operator runs", extra={"metrics_port": port, "lease": settings.lease_name})
    acting = asyncio.create_task(controller.run(), name="controller")
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({acting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if acting.done():
            await acting  # never ends but by a fault of ours
    finally:
        stopped.cancel()
        acting.cancel()
        await asyncio.wait({acting})
        await probes.stop(GRACE_SECONDS)


def _controller(
    settings: OperatorSettings, cluster: Cluster, front: Front | None, observer: Callable[[], Observer]
) -> tuple[Controller, Metrics]:
    clock, metrics = SystemClock(), Metrics()
    # A container that starts anew has its predecessor's pod name, and is another process all the same.
    identity = f"{settings.pod_name}_{uuid4().hex[:8]}"
    lease = Lease(cluster, settings.lease_name, identity, settings.lease_times, clock)
    fenced = FencedCluster(cluster, lease)
    tools = Tools(
        cluster=fenced,
        recorder=Recorder(fenced, settings.pod_name, clock),
        metrics=metrics,
        clock=clock,
        observer=observer,
        policy=QueuePolicy,
        front=front,
        drain=settings.drain_times,
    )

    def tender(name: str, gone: Callable[[str], None]) -> Tender:
        return Tender(Reconciler(name, tools), fenced, metrics, clock, front=front, gone=gone)

    return Controller(cluster, lease, tender, metrics, clock, settings.names), metrics
