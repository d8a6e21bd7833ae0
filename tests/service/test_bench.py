"""`nemoserve bench`, against a real server over an engine that answers at once, and against fakes that misbehave."""

from __future__ import annotations

import asyncio
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.peers.processes import free_port, running, serves
from service.bench.clients import Answer, Ask
from service.bench.load import Plan, Spread, measure, summarise
from service.cli.main import main

PLAN = Plan(requests=4, concurrency=2)


@pytest.fixture(scope="module")
def addresses() -> Iterator[tuple[str, str]]:
    """Of gRPC and HTTP."""
    rpc, http = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    ports = [f"--grpc-port={rpc.rpartition(':')[2]}", f"--http-port={http.rpartition(':')[2]}"]
    with running([sys.executable, "-m", "bench.service.server", *ports], lambda: serves(rpc), 60.0):
        yield rpc, http


def bench(*args: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["bench", "--requests", "6", "--concurrency", "3", "--new-tokens", "5", *args])
    return done.exit_code, done.output


@pytest.mark.parametrize("over", ["grpc", "http"])
def test_every_request_is_counted_and_timed(addresses: tuple[str, str], over: str, tmp_path: Path) -> None:
    where = ["--address", addresses[0]] if over == "grpc" else ["--url", f"http://{addresses[1]}/v1"]
    code, output = bench(*where, "--json", "--plot", str(tmp_path / "times.svg"))
    found = json.loads(output)
    assert code == 0
    assert (found["completed"], found["failed"], found["new_tokens"]) == (6, {}, 30)
    assert found["prompt_tokens"] > 6 * 128
    assert len(found["ttfts"]) == 6
    assert 0 < found["ttft_seconds"]["p50"] <= found["ttft_seconds"]["p99"] <= found["latency_seconds"]["p99"]
    assert ElementTree.parse(tmp_path / "times.svg").getroot().tag.endswith("svg")


def test_requests_at_a_rate_come_at_random_times(addresses: tuple[str, str]) -> None:
    code, output = bench("--address", addresses[0], "--rate", "500")
    assert code == 0
    assert "6 of 6 requests" in output
    assert "500 per second" in output


@pytest.mark.parametrize("over", ["grpc", "http"])
def test_what_the_server_refuses_is_told_and_is_a_failure(addresses: tuple[str, str], over: str) -> None:
    where = ["--address", addresses[0]] if over == "grpc" else ["--url", f"http://{addresses[1]}"]
    code, output = bench(*where, "--model", "other")
    assert code == 1
    assert "0 of 6 requests" in output
    assert "failed 6 times" in output
    assert "other" in output
    assert "tokens/s" not in output  # nothing was measured


def test_a_server_that_is_not_there_is_one_line() -> None:
    code, output = bench("--url", f"http://127.0.0.1:{free_port()}")
    assert code == 1
    assert "name the model with --model" in output
    assert "Traceback" not in output


def test_one_server_at_a_time() -> None:
    code, output = bench("--address", "a:1", "--url", "http://b")
    assert code == 2
    assert "--address and --url" in output


def test_times_are_taken_from_where_they_should_be() -> None:
    good = Answer(submitted=10.0, arrivals=[11.0, 11.5, 13.0], prompt_tokens=7, new_tokens=5)
    found = summarise("s", PLAN, [good, Answer(10.0, error="no"), Answer(10.0, error="no"), Answer(10.0)], 4.0)
    assert found.completed == 1
    assert found.failed == {"no": 2, "no text came": 1}
    assert (found.ttfts, found.itls) == ([1.0], [0.5, 1.5])
    assert found.tpot_seconds.mean == pytest.approx(2.0 / 4)
    assert found.latency_seconds.p99 == 3.0
    assert found.new_tokens_per_second == 5 / 4


def test_percentiles_of_nothing_are_nothing() -> None:
    assert Spread.of([]) == Spread()
    assert Spread.of([1.0, 2.0, 3.0]) == Spread(mean=2.0, p50=2.0, p90=pytest.approx(2.8), p99=pytest.approx(2.98))


class Counting:
    """A client that answers at once and knows how many it had at a time."""

    name = "counting"

    def __init__(self) -> None:
        self.asked: list[Ask] = []
        self.now = self.most = 0

    async def ask(self, ask: Ask) -> Answer:
        self.asked.append(ask)
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0)
        self.now -= 1
        return Answer(submitted=0.0, arrivals=[1.0], new_tokens=1)

    async def close(self) -> None: ...


async def test_no_more_than_asked_for_at_once_and_no_prompt_twice() -> None:
    client = Counting()
    found = await measure(client, Plan(requests=20, concurrency=3))
    assert client.most == 3
    assert found.completed == 20
    assert len({ask.prompt for ask in client.asked[1:]}) == 20
