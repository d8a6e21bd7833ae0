"""A real OTLP endpoint that keeps what it gets."""

from __future__ import annotations

from typing import Any

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Attributes: spans as they came; where it listens, for who sets it."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.address = ""

    def Export(self, request: Any, context: Any) -> Any:
        scopes = [scope for resource in request.resource_spans for scope in resource.scope_spans]
        self.spans += [span for scope in scopes for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()
