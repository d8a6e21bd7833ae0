"""Sends spans to an OpenTelemetry collector. Imported by those who trace: the SDK takes time to load.

What the variables of OpenTelemetry say goes first: OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES name the server,
OTEL_TRACES_SAMPLER decides what is kept, OTEL_BSP_* how it is collected, OTEL_EXPORTER_OTLP_* with which headers,
certificates and compression it is sent.
"""

from __future__ import annotations

import threading

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.semconv.schemas import Schemas

from service.telemetry.spans import Tracing
from service.version import VERSION

FLUSH_SECONDS = 5.0  # for the last spans to leave; a collector that is down must not hold up the end


class Export:
    """Spans of one server on their way to a processor; nothing is registered globally.

    Args:
        content: also record prompts and completions.
    """

    def __init__(self, processor: SpanProcessor, *, content: bool = False) -> None:
        own = Resource({"service.name": "nemoserve", "service.version": VERSION})
        named = Resource.create()
        if named.attributes.get("service.name", "").startswith("unknown_service"):  # type: ignore[union-attr]
            named = named.merge(own)
        self._provider = TracerProvider(resource=own.merge(named), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        tracer = self._provider.get_tracer("nemoserve", VERSION, schema_url=Schemas.V1_44_0.value)
        self.tracing = Tracing(tracer, content=content)

    @classmethod
    def to_collector(cls, endpoint: str, *, content: bool = False) -> Export:
        """Over OTLP/gRPC.

        Args:
            endpoint: http://HOST:PORT, or https for TLS.
        """
        return cls(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)), content=content)

    def close(self) -> None:
        """Send what is left, for a few seconds at most. Blocks: call it in a thread."""
        flush = threading.Thread(target=self._provider.force_flush, name="last-spans", daemon=True)
        flush.start()
        flush.join(FLUSH_SECONDS)
