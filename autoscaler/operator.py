"""The operator's process: its parts put together, its ports, its end."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from uuid import uuid4

from autoscaler.activator import Activator, ActivatorSettings
from autoscaler.activator.http_server import port_for
from autoscaler.clock import SystemClock
from autoscaler.cluster.client import connect
from autoscaler.cluster.events import Recorder
from autoscaler.cluster.face import Cluster
from autoscaler.cluster.lease import FencedCluster, Lease, LeaseTimes
from autoscaler.controller.controller import Controller
from autoscaler.controller.front import Front
from autoscaler.controller.metrics import Metrics
from autoscaler.controller.probes import create_app
from autoscaler.controller.reconcile import Observer, Reconciler, Tools
from autoscaler.controller.tend import Tender, hand_over
from autoscaler.policy import QueuePolicy

log = logging.getLogger(__name__)

PROBES_SECONDS = 2.0  # that a scrape has at the end


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
    stop_seconds: float = 20.0
    lease_times: LeaseTimes = field(default_factory=LeaseTimes)


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
        async with connect(settings.kubeconfig, namespace=settings.namespace) as cluster, AsyncExitStack() as ending:
            activator = Activator(settings.activator) if settings.activate is not None else None
            if activator is not None:
                await activator.start()
                ending.push_async_callback(activator.stop, 0.0)
            controller, metrics = _controller(settings, cluster, _front(settings, activator), observer)
            async with _probes(settings, controller, metrics):
                acting = asyncio.create_task(controller.run(), name="controller")
                stopping = asyncio.create_task(stop.wait())
                await asyncio.wait({acting, stopping}, return_when=asyncio.FIRST_COMPLETED)
                stopping.cancel()
                await asyncio.gather(_end(acting), *([activator.stop(settings.stop_seconds)] if activator else ()))
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def _front(settings: OperatorSettings, activator: Activator | None) -> Front | None:
    if activator is None or settings.activate is None:
        return None
    return Front(settings.activate, settings.pod_name, activator.room)


@asynccontextmanager
async def _probes(settings: OperatorSettings, controller: Controller, metrics: Metrics) -> AsyncIterator[None]:
    app = create_app(metrics.registry, ready=lambda: controller.ready, leads=lambda: controller.leads)
    server = port_for(app)
    port = await server.start(settings.metrics_address)
    log.info("operator runs", extra={"metrics_port": port, "lease": settings.lease_name})
    try:
        yield
    finally:
        await server.stop(PROBES_SECONDS)


async def _end(acting: asyncio.Task[None]) -> None:
    """It gives the lease back. Raises what it ended with by itself, which is a fault of ours."""
    acting.cancel()
    with suppress(asyncio.CancelledError):
        await acting


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
    )

    def tender(name: str, gone: Callable[[str], None]) -> Tender:
        return Tender(Reconciler(name, tools), fenced, metrics, clock, front=front, gone=gone)

    async def bystand() -> None:
        if front is not None:
            reconciler = Reconciler(front.autoscaler, tools)
            try:
                await hand_over(front, reconciler, clock)
            finally:
                await reconciler.close()

    return Controller(cluster, lease, tender, metrics, clock, settings.names, bystand), metrics
