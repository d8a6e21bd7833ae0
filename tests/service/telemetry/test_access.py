"""The access log: a line for each request, true to what the client saw, and without a word of it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from nemoserve.v1 import generation_pb2 as pb

from process.logs import fields
from service.caller import CALLER, Caller
from service.generation import GenerationRequest
from service.logs import within_call
from tests.service.fakes import Gate
from tests.service.grpc.ports import drained, refusal
from tests.service.telemetry.observed import Bell, Observed, ask, observed

GENERATE = "nemoserve.v1.GenerationService/Generate"


@pytest.fixture
async def running() -> AsyncIterator[Observed]:
    async with observed() as each:
        yield each


class Lines(logging.Handler):
    """What is logged from now on, as fields."""

    def __init__(self, level: int = logging.INFO) -> None:
        super().__init__(level)
        self.bell = Bell()
        self.addFilter(within_call)
        self.found: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append({"event": record.getMessage(), **fields(record)})
        self.bell.ring()

    async def until(self, count: int) -> list[dict[str, Any]]:
        await self.bell.until(lambda: len(self.found) >= count)
        return self.found


@pytest.fixture
async def lines() -> AsyncIterator[Lines]:
    handler, logger = Lines(), logging.getLogger("service.telemetry.access")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


async def test_a_request_that_ended_well(running: Observed, lines: Lines) -> None:
    metadata = [("x-request-id", "my-id")]
    await drained(running.port.typed.Generate(ask("a secret"), metadata=metadata, timeout=10))
    [line] = await lines.until(1)
    times = {name: line.pop(name) for name in [*line] if name.endswith("_ms")}
    assert line.pop("peer").startswith("ipv4:127.0.0.1:")
    assert line == {
        "event": "request",
        "request_id": "my-id",
        "protocol": "grpc",
        "method": GENERATE,
        "model": "toy",
        "code": "ok",
        "finish_reason": "length",
        "prompt_tokens": 9,
        "cached_tokens": 1,
        "output_tokens": 3,
    }
    assert set(times) == {"queue_ms", "ttft_ms", "itl_p50_ms", "itl_p99_ms", "total_ms"}
    assert times["queue_ms"] >= 250  # what the engine says, after what the request waited for it
    assert 0 < times["ttft_ms"] <= times["total_ms"]


async def test_one_that_was_cancelled_and_one_that_was_refused(running: Observed, lines: Lines) -> None:
    running.engine.gate = Gate()
    call = running.port.typed.Generate(ask())
    await running.engine.until(lambda: len(running.engine.requests) == 1)
    call.cancel()
    await lines.until(1)
    await refusal(running.port.typed.Generate(ask(temperature=-1)))
    cancelled, refused = await lines.until(2)
    assert (cancelled["code"], refused["code"]) == ("cancelled", "invalid_argument")
    assert "prompt_tokens" not in cancelled


async def test_calls_that_bring_no_request_have_their_own_line_and_probes_none(running: Observed, lines: Lines) -> None:
    await running.port.typed.GetLoad(pb.GetLoadRequest())
    await running.port.typed.Tokenize(pb.TokenizeRequest(text="a secret"))
    await refusal(running.port.typed.Generate(ask(model="other")))
    tokenize, generate = await lines.until(2)
    assert (tokenize["event"], tokenize["method"], tokenize["code"]) == (
        "call",
        "nemoserve.v1.GenerationService/Tokenize",
        "ok",
    )
    assert (generate["event"], generate["method"], generate["code"]) == ("call", GENERATE, "not_found")
    assert "secret" not in str(lines.found)


async def test_whose_request_it_was(running: Observed, lines: Lines) -> None:
    CALLER.set(Caller(tenant="acme"))
    request = GenerationRequest(request_id="a", prompt="Hi", tenant=CALLER.get().tenant)
    assert [event async for event in running.model.generate(request)]
    [line] = lines.found
    assert (line["tenant"], line["request_id"]) == ("acme", "a")
    assert "method" not in line  # it came through no protocol


async def test_a_fault_of_ours_says_in_the_log_whose_request_it_was(
    running: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("ours")

    lines, logger = Lines(), logging.getLogger("service.grpc.interceptors")
    logger.addHandler(lines)
    monkeypatch.setattr(running.model, "tokenize", broken)
    call = running.port.typed.Tokenize(pb.TokenizeRequest(text="Hi"), metadata=[("x-request-id", "my-id")])
    assert (await refusal(call)).details().startswith("internal error")
    logger.removeHandler(lines)
    [line] = lines.found
    assert (line["event"], line["request_id"]) == ("an RPC failed", "my-id")
