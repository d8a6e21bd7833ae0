"""Load reports: the bytes beside protobuf's own reading of them, and where they are sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc

from engine import EngineStats
from service.telemetry import orca
from tests.service.grpc.ports import drained
from tests.service.telemetry.observed import ask, observed

BUSY = EngineStats(running=6, queued=6, max_batch_size=8, kv_pages_used=16, kv_pages_total=64)
F = descriptor_pb2.FieldDescriptorProto


def report_class() -> Any:
    """xds.data.orca.v3.OrcaLoadReport with the fields that are sent, made of its definition in cncf/xds."""
    file = descriptor_pb2.FileDescriptorProto(name="orca.proto", package="xds.data.orca.v3", syntax="proto3")
    message = file.message_type.add(name="OrcaLoadReport")
    message.field.add(name="application_utilization", number=9, type=F.TYPE_DOUBLE, label=F.LABEL_OPTIONAL)
    for name, entry, number in (("utilization", "UtilizationEntry", 5), ("named_metrics", "NamedMetricsEntry", 8)):
        nested = message.nested_type.add(name=entry)
        nested.options.map_entry = True
        nested.field.add(name="key", number=1, type=F.TYPE_STRING, label=F.LABEL_OPTIONAL)
        nested.field.add(name="value", number=2, type=F.TYPE_DOUBLE, label=F.LABEL_OPTIONAL)
        kind = f".xds.data.orca.v3.OrcaLoadReport.{entry}"
        message.field.add(name=name, number=number, type=F.TYPE_MESSAGE, label=F.LABEL_REPEATED, type_name=kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("xds.data.orca.v3.OrcaLoadReport"))


@pytest.mark.parametrize("stats", [BUSY, EngineStats(), EngineStats(kv_pages_used=3, kv_pages_total=4)])
def test_the_bytes_are_the_message(stats: EngineStats) -> None:
    report = report_class().FromString(orca.encode(stats))
    application, utilization, named = orca.report(stats)
    assert report.application_utilization == application
    assert dict(report.utilization) == utilization
    assert dict(report.named_metrics) == named
    assert len(orca.encode(stats)) < 150


def test_who_waits_makes_a_replica_more_than_full() -> None:
    application, utilization, named = orca.report(BUSY)
    assert (application, utilization) == (1.5, {"kv_cache": 0.25})
    assert named == {"num_requests_waiting": 6, "num_requests_running": 6}
    assert orca.report(EngineStats(kv_pages_used=3, kv_pages_total=4, max_batch_size=8))[0] == 0.75


def test_headers_come_in_the_form_that_was_asked_for() -> None:
    text, as_json = orca.header(BUSY, "text"), orca.header(BUSY, "JSON")
    assert text is not None
    assert as_json is not None
    assert text.startswith("TEXT application_utilization=1.5,utilization.kv_cache=0.25,named_metrics.num_requests_")
    assert json.loads(as_json.removeprefix("JSON "))["utilization"] == {"kv_cache": 0.25}
    assert orca.header(BUSY, "BIN") is None


async def test_an_rpc_that_makes_tokens_ends_with_a_report_and_keeps_its_own_trailers() -> None:
    """gRPC's client takes the report for its own balancing and hides it: seen on the wire, where names are plain."""
    async with observed() as running, recorded(running.port.address) as (address, bytes_seen):
        running.engine.stats = BUSY
        async with grpc.aio.insecure_channel(address) as channel:
            stub: Any = rpc.GenerationServiceStub(channel)
            await stub.Tokenize(pb.TokenizeRequest(text="Hi"))
            assert orca.TRAILER.encode() not in bytes_seen
            call = stub.Generate(ask(), metadata=[("x-request-id", "me")])
            await drained(call)
            assert dict(await call.trailing_metadata()) == {"x-request-id": "me"}
            assert orca.TRAILER.encode() in bytes_seen


@asynccontextmanager
async def recorded(address: str) -> AsyncIterator[tuple[str, bytearray]]:
    """A relay to the address, and what has come back through it."""
    seen = bytearray()

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record: bool) -> None:
        while data := await reader.read(2**16):
            if record:
                seen.extend(data)
            writer.write(data)
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, downstream = await asyncio.open_connection(*address.split(":"))
        await asyncio.gather(pipe(reader, downstream, False), pipe(upstream, writer, True))

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        yield f"{host}:{port}", seen
