"""What must hold behind every fault, whatever it was: the one check that all rows share.

Every request ended once, and its client and the server's counters tell the same story; nobody waits or runs; no page is
held; memory is what it was; the server is ready, and answers as before.
"""

from __future__ import annotations

import asyncio
import http.client
from collections import Counter
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from grpc_health.v1 import health_pb2, health_pb2_grpc
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import ServerProcess
from tests.e2e.faults.clients import End, Ended
from tests.e2e.test_life import engine_of

GROWTH_BYTES = 384 * 2**20  # of either process in one test: compiled grammars are kept, 256 MiB of them
SETTLED_SECONDS = 150.0  # an engine that is started five times in a row, on a machine that is busy with other things

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass
class Ledger:
    """Requests in which nothing is wrong, and how they ended. A kind of `Ask` that no server has seen is none."""

    sent: int = 0
    ends: list[Ended] = field(default_factory=list)

    async def count(self, asked: Awaitable[Ended]) -> Ended:
        self.sent += 1
        ended = await asked
        self.ends.append(ended)
        return ended

    @property
    def tally(self) -> Counter[End]:
        return Counter(ended.how for ended in self.ends)


def metrics(server: ServerProcess) -> Samples:
    connection = http.client.HTTPConnection(server.http_address, timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    families = text_string_to_metric_families(text)
    return {(each.name, frozenset(each.labels.items())): each.value for family in families for each in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def outcomes(samples: Samples) -> Counter[str]:
    found: Counter[str] = Counter()
    for (name, labels), count in samples.items():
        if name == "nemoserve_requests_total":
            found[dict(labels)["outcome"]] += int(count)
    return found


def memory(pid: int, field: str = "VmRSS") -> int:
    """Bytes that a process holds; VmHWM: has held at most since `forget_peak`."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def answer(server: ServerProcess) -> str:
    """A greedy answer: the same whenever it is asked for."""
    sampling = pb.SamplingParameters(max_tokens=8, temperature=0, ignore_eos=True)
    request = pb.GenerateRequest(prompt="The capital of France is", sampling=sampling)
    with server.channel() as channel:
        events = rpc.GenerationServiceStub(channel).Generate(request, timeout=60)
        return "".join(event.delta.text for event in events)


def healthy(server: ServerProcess) -> bool:
    with server.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        states = [
            health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status
            for name in ("nemoserve.live", "nemoserve.ready", "")
        ]
    connection = http.client.HTTPConnection(server.http_address, timeout=10)
    connection.request("GET", "/v1/health/ready")
    ready = connection.getresponse().status == 200
    connection.close()
    return ready and set(states) == {health_pb2.HealthCheckResponse.SERVING}


@contextmanager
def nothing_left(server: ServerProcess) -> Iterator[Ledger]:
    """Around a fault; see the module. Requests that the ledger counts are compared with the counters."""
    ledger, said = Ledger(), answer(server)
    before, engine = metrics(server), engine_of(server)
    pids = (server.process.pid, engine)
    held = [memory(pid) for pid in pids]
    yield ledger
    server.until("a ready server", lambda load: load.phase == pb.PHASE_READY, SETTLED_SECONDS)
    load = server.until(
        "an empty server",
        lambda load: (load.queued_requests, load.running_requests, load.kv_pages_used) == (0, 0, 0),
        SETTLED_SECONDS,
    )
    assert (load.queued_tokens, load.oldest_queued_seconds) == (0, 0)
    if ledger.sent:
        _compare(ledger, outcomes(metrics(server)) - outcomes(before))
    assert healthy(server)
    assert answer(server) == said
    grown = [memory(pid) - size for pid, size in zip(pids, held, strict=True) if Path(f"/proc/{pid}").exists()]
    print(f"{dict(ledger.tally)}; memory grew by {[f'{size / 2**20:.0f} MiB' for size in grown]}")
    assert max(grown) < GROWTH_BYTES


def _compare(ledger: Ledger, counted: Counter[str]) -> None:
    """Clients that leave, or whose deadline passes, do not learn how the server saw that. While there is no engine some
    calls are refused before there is a request: they are in `nemoserve_calls_total` alone."""
    seen = ledger.tally
    assert seen.total() == ledger.sent, "a request has no end"
    turned_away = sum(ended.how is End.UNAVAILABLE and not ended.started for ended in ledger.ends)
    unsure = seen[End.LEFT] + seen[End.DEADLINE]
    failed = counted["rejected"] + counted["error"]
    done = counted["length"] + counted["stop"]
    assert ledger.sent - unsure - turned_away <= counted.total() <= ledger.sent, (seen, counted)
    assert seen[End.DONE] <= done <= seen[End.DONE] + unsure, (seen, counted)
    told = seen[End.REFUSED] + seen[End.UNAVAILABLE]
    assert told - turned_away <= failed <= told + unsure, (seen, counted)


async def until_ready(server: ServerProcess) -> None:
    """Looks five times a second: who asks all the time takes the cores that the engine needs to start."""
    async with asyncio.timeout(SETTLED_SECONDS):
        while (await asyncio.to_thread(server.load)).phase != pb.PHASE_READY:  # noqa: ASYNC110 -- of another process
            await asyncio.sleep(0.2)
