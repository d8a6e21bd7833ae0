"""Traces: what spans there are, what they say, and that a collector gets them over the wire."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from nemoserve.v1 import generation_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from tritonclient.grpc import service_pb2_grpc

from service.generation import Delta, GenerationRequest, ToolCallDelta
from service.telemetry.export import Export
from service.telemetry.spans import Content
from tests.service.fakes import Gate
from tests.service.grpc.kserve.calls import stream, vllm
from tests.service.grpc.ports import drained, refusal
from tests.service.telemetry.collector import Collector
from tests.service.telemetry.observed import Bell, Observed, ask, observed

GENERATE = "nemoserve.v1.GenerationService/Generate"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Memory(InMemorySpanExporter):
    """Rings when it gets something."""

    def __init__(self) -> None:
        super().__init__()
        self.bell = Bell()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = super().export(spans)
        self.bell.ring()
        return result


@dataclass
class Traced:
    running: Observed
    exporter: Memory

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        """By name, each of which there is once."""
        found = self.exporter.get_finished_spans()
        assert len({span.name for span in found}) == len(found)
        return {span.name: span for span in found}

    async def ended(self, count: int) -> dict[str, ReadableSpan]:
        await self.exporter.bell.until(lambda: len(self.exporter.get_finished_spans()) >= count)
        return self.spans


@pytest.fixture
async def traced(request: pytest.FixtureRequest) -> AsyncIterator[Traced]:
    exporter = Memory()
    export = Export(SimpleSpanProcessor(exporter), content=getattr(request, "param", False))
    async with observed(export.tracing) as running:
        yield Traced(running, exporter)
    export.close()


def chat(text: str) -> pb.GenerateRequest:
    messages = [pb.ChatMessage(role="user", content=text)]
    return pb.GenerateRequest(
        chat=pb.Chat(messages=messages), sampling=pb.SamplingParameters(max_tokens=3, seed=7, top_k=5)
    )


async def test_a_request_is_a_span_in_that_of_its_call_in_the_callers_trace(traced: Traced) -> None:
    metadata = [("traceparent", PARENT)]
    await drained(traced.running.port.typed.Generate(chat("Hi"), metadata=metadata, timeout=10))
    spans = await traced.ended(5)
    call, request = spans[GENERATE], spans["chat toy"]
    assert call.parent is not None
    assert format(call.parent.span_id, "016x") == "b7ad6b7169203331"
    assert {format(span.context.trace_id, "032x") for span in spans.values()} == {"0af7651916cd43dd8448eb211c80319c"}
    assert (call.kind, request.kind) == (SpanKind.SERVER, SpanKind.INTERNAL)
    assert request.parent == call.context
    assert call.attributes is not None
    assert call.attributes["rpc.system.name"] == "grpc"
    assert (call.attributes["rpc.method"], call.attributes["rpc.response.status_code"]) == (GENERATE, "OK")
    assert (
        dict(request.attributes or {}).items()
        >= {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "nemoserve",
            "gen_ai.request.model": "toy",
            "gen_ai.request.max_tokens": 3,
            "gen_ai.request.seed": 7,
            "gen_ai.request.top_k": 5,
            "gen_ai.response.finish_reasons": ("length",),
            "gen_ai.usage.output_tokens": 3,
            "gen_ai.usage.cache_read.input_tokens": 1,
        }.items()
    )
    assert request.instrumentation_scope is not None
    assert request.instrumentation_scope.schema_url == "https://opentelemetry.io/schemas/1.44.0"
    assert request.resource.attributes["service.name"] == "nemoserve"


async def test_queue_prefill_and_decode_follow_one_another_and_fill_the_request(traced: Traced) -> None:
    await drained(traced.running.port.typed.Generate(ask(), timeout=10))
    spans = await traced.ended(5)
    request = spans["text_completion toy"]
    parts = [spans[name] for name in ("queue", "prefill", "decode")]
    assert all(part.parent == request.context for part in parts)
    edges = [(part.start_time, part.end_time) for part in parts]
    assert edges[0][0] == request.start_time
    assert edges[2][1] == request.end_time
    assert [edges[0][1], edges[1][1]] == [edges[1][0], edges[2][0]]
    assert all(start <= end for start, end in edges)  # type: ignore[operator]


@pytest.mark.parametrize(
    "garbage", ["", "00-0-0-01", f"00-{'0' * 32}-{'0' * 16}-01", PARENT + "-x", "ff" + PARENT[2:], "x" * 4096]
)
async def test_what_is_no_traceparent_begins_a_new_trace(traced: Traced, garbage: str) -> None:
    metadata = [("traceparent", garbage)]
    await drained(traced.running.port.typed.Generate(ask(), metadata=metadata, timeout=10))
    call = (await traced.ended(5))[GENERATE]
    assert call.parent is None


async def test_a_caller_who_goes_away_is_no_error_but_is_told(traced: Traced) -> None:
    engine = traced.running.engine
    engine.gate = Gate()
    call = traced.running.port.typed.Generate(ask(), timeout=10)
    await engine.until(lambda: len(engine.requests) == 1)
    call.cancel()
    spans = await traced.ended(3)
    assert set(spans) == {GENERATE, "text_completion toy", "queue"}
    for span in (spans[GENERATE], spans["text_completion toy"]):
        assert span.status.status_code is StatusCode.UNSET
        assert (span.attributes or {})["error.type"] == "cancelled"


async def test_refusals_and_faults_have_their_status(traced: Traced) -> None:
    await refusal(traced.running.port.typed.Generate(ask(temperature=-1)))
    spans = await traced.ended(2)
    assert {span.status.status_code for span in spans.values()} == {StatusCode.UNSET}
    assert {(span.attributes or {})["error.type"] for span in spans.values()} == {"invalid_argument"}
    traced.exporter.clear()
    traced.running.model.failed("lost")
    await refusal(traced.running.port.typed.Generate(ask()))
    spans = await traced.ended(2)
    assert {span.status.status_code for span in spans.values()} == {StatusCode.ERROR}
    assert {(span.attributes or {})["error.type"] for span in spans.values()} == {"unavailable"}


async def test_prompts_and_answers_are_in_no_span(traced: Traced) -> None:
    await drained(traced.running.port.typed.Generate(chat("a secret"), timeout=10))
    spans = await traced.ended(5)
    assert not [span.name for span in spans.values() if "secret" in span.to_json() or "messages" in span.to_json()]


@pytest.mark.parametrize("traced", [True], indirect=True)
async def test_on_demand_they_are_as_the_conventions_want_them(traced: Traced) -> None:
    await drained(traced.running.port.typed.Generate(chat("a secret"), timeout=10))
    attributes: Any = (await traced.ended(5))["chat toy"].attributes
    question = [{"role": "user", "parts": [{"type": "text", "content": "a secret"}]}]
    answer = [{"role": "assistant", "parts": [{"type": "text", "content": "abc"}], "finish_reason": "length"}]
    assert json.loads(attributes["gen_ai.input.messages"]) == question
    assert json.loads(attributes["gen_ai.output.messages"]) == answer


def test_a_call_of_a_tool_is_put_together_from_its_pieces() -> None:
    content = Content(GenerationRequest(request_id="a", prompt=[1, 2]))
    content.add(Delta(index=0, text="", tool_calls=[ToolCallDelta(call=0, id="c1", name="add", arguments='{"a"')]))
    content.add(Delta(index=0, text="", tool_calls=[ToolCallDelta(call=0, arguments=": 1}")]))
    attributes = content.attributes(["stop"])
    assert set(attributes) == {"gen_ai.output.messages"}  # ids of tokens are no text
    [message] = json.loads(attributes["gen_ai.output.messages"])
    assert message["parts"][-1] == {"type": "tool_call", "id": "c1", "name": "add", "arguments": '{"a": 1}'}


async def test_requests_of_one_stream_are_spans_within_one_call(traced: Traced) -> None:
    stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(traced.running.port.channel)
    await stream(stub, vllm("hi"), vllm("ho"))
    exporter = traced.exporter
    await exporter.bell.until(lambda: len(exporter.get_finished_spans()) == 9)
    spans = exporter.get_finished_spans()
    [call] = [span for span in spans if span.kind is SpanKind.SERVER]
    assert call.name == "inference.GRPCInferenceService/ModelStreamInfer"
    assert [span.parent for span in spans if span.name == "text_completion toy"] == [call.context] * 2


async def test_a_collector_gets_what_is_left_when_the_server_ends() -> None:
    collector, server = Collector(), grpc.server(futures.ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    export = Export.to_collector(f"http://127.0.0.1:{port}")
    async with observed(export.tracing) as running:
        await drained(running.port.typed.Generate(ask(), timeout=10))
    await asyncio.to_thread(export.close)
    server.stop(0)
    assert sorted(span.name for span in collector.spans) == sorted(
        [GENERATE, "text_completion toy", "queue", "prefill", "decode"]
    )
