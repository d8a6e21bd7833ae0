"""The operator's process over real servers: none, one for a request that is held, three for load, one again.

The cluster is the fake API server with its nodes; the container of a pod is a `nemoserve serve` of the embedded model,
at an address of its own. Clients connect as through a Service: to whoever its endpoints are when they ask.
"""

from __future__ import annotations

import asyncio
import copy
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc

from autoscaler.cluster.face import DEPLOYMENTS, EVENTS, PODS, QUEUE_AUTOSCALERS
from autoscaler.controller.drain import SERVES
from tests.autoscaler.api_under_test import definition
from tests.autoscaler.fake_api import FakeApi
from tests.autoscaler.fake_api.nodes import Container
from tests.autoscaler.fake_api.workloads import Workloads, endpoints
from tests.server import NEMOSERVE

NAME, OPERATOR = "nemo", "operator-0"
OPERATOR_IP = "127.77.200.1"  # beyond those of the nodes' pods
SLOTS = 8  # of a server
SECONDS = 120.0  # for whatever is waited for: the machine may be slow
SPEC: dict[str, Any] = {
    "scaleTargetRef": {"kind": "Deployment", "name": NAME},
    "minReplicas": 0,
    "maxReplicas": 3,
    "target": {"queuedTokensPerReplica": 60},
    "behavior": {"scaleIn": {"windowSeconds": 1}},
    "scaleToZero": {"enabled": True, "idleSeconds": 600},
}


@dataclass
class Fleet:
    """The programs of the pods.

    Attributes:
        log: what happened, in order: (pod, `ready`, `stopping` or `ended CODE`).
    """

    model: Path
    log: list[tuple[str, str]] = field(default_factory=list)

    async def __call__(self, container: Container) -> None:
        """`autoscaler…nodes.Program`."""
        name = container.pod["metadata"]["name"]
        args = (self.model, "--host", container.ip, "--grpc-port", 8001, "--http-port", 8000, "--lame-duck", 0)
        process = await asyncio.create_subprocess_exec(
            str(NEMOSERVE), "serve", *map(str, args), "--max-batch-size", str(SLOTS), "--log-level", "error",
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        try:
            told = asyncio.create_task(self._told(process, container, name))
            await container.stopping.wait()
            self.log.append((name, "stopping"))
            process.terminate()
            await told
            self.log.append((name, f"ended {await process.wait()}"))
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def _told(self, process: asyncio.subprocess.Process, container: Container, name: str) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            if b"ready at" in line:
                self.log.append((name, "ready"))
                container.ready()

    def ready(self) -> int:
        return sum(what == "ready" for _, what in self.log)


@dataclass
class Clients:
    """Attributes:
    endings: how many `finished` each request got, by its number, and how it ended else.
    """

    api: FakeApi
    channels: dict[str, grpc.aio.Channel] = field(default_factory=dict)
    endings: dict[int, list[str]] = field(default_factory=dict)
    loops: list[asyncio.Task[None]] = field(default_factory=list)

    async def ask(self, tokens: int, ip: str | None = None) -> None:
        """One request, to an endpoint of the Service unless it is said to whom; it is never tried again."""
        if ip is None:
            ip = random.choice(endpoints(self.api, f"{SERVES}={NAME}"))
        number = len(self.endings)
        self.endings[number] = []
        sampling = pb.SamplingParameters(max_tokens=tokens, ignore_eos=True)
        request = pb.GenerateRequest(prompt=f"Story {number}: once upon a time there was", sampling=sampling)
        try:
            async for answer in self._service(ip).Generate(request, timeout=2 * SECONDS):
                if answer.HasField("finished"):
                    assert answer.finished.usage.completion_tokens == tokens
                    self.endings[number].append("finished")
        except grpc.aio.AioRpcError as error:
            self.endings[number].append(f"{error.code().name}: {error.details()} by {ip}")

    async def running(self, ip: str) -> int:
        """Requests that this server is at."""
        found = await self._service(ip).GetLoad(pb.GetLoadRequest(), timeout=SECONDS)
        return int(found.load.running_requests)

    @asynccontextmanager
    async def asking(self, count: int, tokens: int, ip: str | None = None) -> AsyncIterator[None]:
        """So many requests at the same time, one after the other; at the end those under way end too."""
        stopped = asyncio.Event()

        async def loop() -> None:
            while not stopped.is_set():
                await self.ask(tokens, ip)

        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(loop())
            yield
            stopped.set()

    def _service(self, ip: str) -> rpc.GenerationServiceAsyncStub:
        if ip not in self.channels:
            self.channels[ip] = grpc.aio.insecure_channel(f"{ip}:8001", [("grpc.enable_retries", 0)])
        return rpc.GenerationServiceStub(self.channels[ip])

    async def close(self) -> None:
        for channel in self.channels.values():
            await channel.close()


@asynccontextmanager
async def operator(api: FakeApi, folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """The process, with its activator at OPERATOR_IP; its log goes to the test's output."""
    command = Path(sys.executable).parent / "nemoserve-autoscaler"
    args = ["--kubeconfig", api.kubeconfig(folder), "--pod-name", OPERATOR, "--activate", NAME]
    args += ["--activator-host", OPERATOR_IP, "--metrics-host", "127.0.0.1", "--metrics-port", "0"]
    process = await asyncio.create_subprocess_exec(str(command), *map(str, args))
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            await asyncio.wait_for(process.wait(), SECONDS)


async def until(what: str, condition: Callable[[], object], seconds: float = SECONDS) -> None:
    try:
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110  # of other processes
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"never came to that: {what}") from None


def ready(api: FakeApi) -> None:
    """The operator's pod is, as its kubelet finds."""
    condition = {"type": "Ready", "status": "True", "lastTransitionTime": "2025-11-26T08:00:00Z"}
    status = {"phase": "Running", "podIP": OPERATOR_IP, "conditions": [condition]}
    pods = api.machinery.resource("", "pods")
    api.machinery.update(pods, "default", OPERATOR, lambda old: old | {"status": status}, "status")


def objects() -> list[dict[str, Any]]:
    labels = {"app": NAME}
    template = {
        "metadata": {"labels": labels | {SERVES: NAME}},
        "spec": {"containers": [{"name": "server", "image": "nemoserve"}], "terminationGracePeriodSeconds": 60},
    }
    spec = {"replicas": 0, "selector": {"matchLabels": labels}, "template": template}
    pod = {"containers": [{"name": "autoscaler", "image": "nemoserve-autoscaler"}], "nodeName": "node-of-operators"}
    return [
        copy.deepcopy(definition()),
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": NAME}, "spec": spec},
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": OPERATOR}, "spec": pod},
        {
            "apiVersion": "autoscaling.nemoserve.dev/v1alpha1",
            "kind": "QueueAutoscaler",
            "metadata": {"name": NAME},
            "spec": SPEC,
        },
    ]


class Story:
    """What a person sees of it by kubectl."""

    def __init__(self, api: FakeApi) -> None:
        self._api = api

    @property
    def asked(self) -> int:
        replicas: int = self._api.get(DEPLOYMENTS, NAME)["spec"]["replicas"]
        return replicas

    @property
    def ips(self) -> list[str]:
        return endpoints(self._api, f"{SERVES}={NAME}")

    def pod(self, ip: str) -> str:
        [name] = [each["metadata"]["name"] for each in self._api.list(PODS) if each["status"].get("podIP") == ip]
        return str(name)

    def notes(self, reason: str) -> str:
        """Of all Events with this reason."""
        return "\n".join(each["note"] for each in self._api.list(EVENTS) if each["reason"] == reason)

    @property
    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self._api.get(QUEUE_AUTOSCALERS, NAME)["status"]
        return status

    def pin(self, replicas: int | None) -> None:
        """`kubectl scale qas nemo --replicas=N`; None: as `kubectl patch` takes it away."""
        scalers = self._api.machinery.resource("autoscaling.nemoserve.dev", "queueautoscalers")
        pinned = {} if replicas is None else {"replicas": replicas}

        def alter(old: dict[str, Any]) -> dict[str, Any]:
            return old | {"spec": {name: value for name, value in old["spec"].items() if name != "replicas"} | pinned}

        self._api.machinery.update(scalers, "default", NAME, alter)


async def test_replicas_follow_load_and_no_request_is_lost(smollm2_path: Path, tmp_path: Path) -> None:
    fleet = Fleet(smollm2_path)
    async with FakeApi() as api, Workloads(api, fleet):
        api.apply(*objects())
        ready(api)
        clients, story = Clients(api), Story(api)
        async with operator(api, tmp_path) as process:
            await from_none_to_one(clients, story)
            await from_one_to_three(clients, story)
            await from_three_to_one(clients, story, fleet)
            await clients.close()
            process.terminate()
            assert await asyncio.wait_for(process.wait(), SECONDS) == 0
        assert Counter(map(tuple, clients.endings.values())) == {("finished",): len(clients.endings)}


async def from_none_to_one(clients: Clients, story: Story) -> None:
    await until("the activator stands in", lambda: story.ips == [OPERATOR_IP])
    await clients.ask(5)  # is held until the first replica is there
    await until("the replica is the endpoint", lambda: len(story.ips) == 1 and story.ips != [OPERATOR_IP])


async def from_one_to_three(clients: Clients, story: Story) -> None:
    async with clients.asking(20, 20):
        await until("three are asked for", lambda: story.asked == 3)
        story.pin(3)  # whatever load does while they start, which takes the cores
    assert "from 1 to 3" in story.notes("ScaledOut")
    assert "queued tokens at 60 each" in story.notes("ScaledOut")
    async with clients.asking(2, 20):
        await until("three are endpoints", lambda: len(story.ips) == 3)


async def from_three_to_one(clients: Clients, story: Story, fleet: Fleet) -> None:
    busiest, busy, idle = story.ips
    names = {ip: story.pod(ip) for ip in story.ips}
    async with clients.asking(3, 40, busiest):
        async with clients.asking(2, 40, busy):  # over connections that are open: a Service has no say in them
            while (await clients.running(busiest), await clients.running(busy)) != (3, 2):
                pass
            story.pin(None)
            await until("the idlest ends", lambda: (names[idle], "stopping") in fleet.log)
            await until("the busy one is an endpoint no more", lambda: story.ips == [busiest])
            assert (names[busy], "stopping") not in fleet.log
        await until("it ends when it is idle", lambda: (names[busy], "stopping") in fleet.log)
        await until("both have ended", lambda: sum(what == "ended 0" for _, what in fleet.log) == 2)
    assert (story.ips, story.asked) == ([busiest], 1)
    assert names[idle] in story.notes("Draining")
    assert f"{names[idle]}: idle" in story.notes("ScaledIn")
    assert f"{names[busy]}: idle" in story.notes("ScaledIn")
    assert "pinned to 3 by spec.replicas" in story.notes("Pinned")
    assert [each["to"] for each in story.status["decisions"]][:2] == [1, 3]
