"""The text of /metrics in place of GetLoad, from servers that say anything."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import httpx
import pytest

from autoscaler.fleet import Phase
from autoscaler.observe import servers
from autoscaler.observe.servers import MAX_TEXT_BYTES
from tests.autoscaler.controller.clock import until
from tests.autoscaler.observe.replicas import VLLM, FakeReplica, Spec, Web, fleet, free_port, patient, pod

ENDLESS = "x" * 65_536 + "\n"


async def test_where_get_load_fails_the_metrics_are_read() -> None:
    replica = FakeReplica("127.0.9.1")
    async with fleet(1) as here, Web(VLLM).at(replica.ip, here.spec.metrics_port) as web:
        observer = patient()
        seen = await observer.look([*here.pods, pod("vllm", ip=replica.ip)], here.spec, 1.0)
        assert seen[1].load is not None
        assert (seen[1].load.running_requests, seen[1].load.queued_requests, seen[1].observed_at) == (3, 2, 1.0)
        assert seen[1].phase is Phase.READY
        starting = pod("vllm", Phase.STARTING, ip=replica.ip)
        [seen_starting] = await observer.look([starting], here.spec, 2.0)
        assert (seen_starting.observed_at, len(web.requests)) == (1.0, 1)  # it was not asked
        assert web.requests[0].startswith("GET /metrics HTTP/1.1")
        await observer.close()


async def test_few_texts_are_in_memory_at_once_however_many_servers_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "TEXTS_AT_ONCE", 2)
    web, spec, ips = Web(VLLM), Spec(free_port(), free_port()), [f"127.0.9.{number}" for number in range(10, 16)]
    body, read, most = httpx.Response.aiter_raw, 0, 0

    async def counted(response: httpx.Response) -> AsyncIterator[bytes]:
        nonlocal read, most
        read += 1
        most = max(most, read)
        await until(lambda: len(web.requests) == len(ips))
        async for each in body(response):
            yield each
        read -= 1

    monkeypatch.setattr(httpx.Response, "aiter_raw", counted)
    async with AsyncExitStack() as stack:
        for ip in ips:
            await stack.enter_async_context(web.at(ip, spec.metrics_port))
        observer = patient()
        seen = await observer.look([pod(ip, ip=ip) for ip in ips], spec, 1.0)
        assert [each.load is not None for each in seen] == [True] * len(ips)
        await observer.close()
    assert most == 2


@pytest.mark.parametrize(
    ("head", "body", "word"),
    [
        ("404 Not Found", VLLM, "status 404"),
        ("302 Found\r\nlocation: http://127.0.0.1:1/metrics", "", "status 302"),
        ("200 OK\r\ncontent-encoding: gzip", VLLM, "packed"),
        ("200 OK", "<html>", "neither"),
        ("200 OK", VLLM + "vllm:num_requests_running NaN\n", "nan"),
        ("200 OK", ENDLESS, f"more than {MAX_TEXT_BYTES} bytes"),
        ("200 OK\r\ncontent-length: 1000000", VLLM, "RemoteProtocolError"),
        ("not HTTP", "", "RemoteProtocolError"),
    ],
    ids=["missing", "redirect", "packed", "page", "NaN", "endless", "cut", "other"],
)
async def test_text_that_is_none_stops_nobody(
    head: str, body: str, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    web = Web(body, head)
    web.endless = body == ENDLESS
    async with fleet(1) as here, web.at("127.0.9.1", here.spec.metrics_port):
        observer = patient()
        for at in (1.0, 2.0):
            seen = await observer.look([*here.pods, pod("odd", ip="127.0.9.1")], here.spec, at)
            assert [each.load is not None for each in seen] == [True, False]
        [complaint] = [each for each in caplog.records if each.message == "a replica is silent"]  # once
        assert word in vars(complaint)["reason"]
        assert vars(complaint)["pod"] == "odd"
        await observer.close()
