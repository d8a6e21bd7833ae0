"""All that one server tells about itself, in one object: the edges of protocols and the served model report to it, the
scraper, the collector and the log read from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine import EngineStats
from engine.histogram import Histogram
from service.host import Host
from service.names import is_request_id
from service.telemetry.access import log_call
from service.telemetry.calls import Call
from service.telemetry.metrics import Metrics
from service.telemetry.requests import Requests
from service.telemetry.spans import Tracing, end_call


class Telemetry:
    """Belongs to the event loop of the served model.

    Args:
        aliases: metrics also under the names of others.
        tracing: None while nobody traces.

    Attributes:
        requests: the observer of the served model.
    """

    def __init__(self, host: Host, *, aliases: bool = True, tracing: Tracing | None = None) -> None:
        self._host = host
        self.metrics = Metrics(host, aliases=aliases)
        self.requests = Requests(host, self.metrics, tracing)
        self._tracing = tracing

    @property
    def stats(self) -> EngineStats:
        """The load now, for reports to balancers."""
        return self._host.stats

    @property
    def first_tokens(self) -> Histogram:
        """Seconds from arrival to first token, of all requests that had one."""
        return self.metrics.first_tokens

    @property
    def per_token(self) -> Histogram:
        """Mean seconds from token to token of each request that ended."""
        return self.metrics.per_token

    def open(
        self,
        protocol: str,
        named: Callable[[], str],
        *,
        peer: str,
        headers: Mapping[str, str],
        span: str,
        attributes: Callable[[], Mapping[str, Any]],
    ) -> Call:
        """A call has arrived; it is for its edge to make it `service.telemetry.calls.CALL`.

        Args:
            named: see `Call`.
            headers: `traceparent`, `tracestate` and `x-request-id` are read.
            span, attributes: of the SERVER span, if there is one.
        """
        given = headers.get("x-request-id", "")
        call = Call(protocol=protocol, named=named, peer=peer, request_id=given if is_request_id(given) else "")
        if self._tracing is not None:
            call.span = self._tracing.call(span, headers, attributes())
        return call

    def close(
        self,
        call: Call,
        code: str,
        attributes: Callable[[], Mapping[str, Any]],
        *,
        failed: bool | None = None,
        quiet: bool = False,
    ) -> None:
        """A call has ended.

        Args:
            code: for metrics and log: `ok` or what went wrong, in the words of gRPC, or the status of HTTP.
            attributes: more of the SERVER span.
            failed: see `service.telemetry.spans.end_call`.
            quiet: keep it out of the log; it is of the kind that comes every few seconds.
        """
        self.metrics.calls[call.protocol, call.method, code] += 1
        if call.span is not None:
            end_call(call.span, code, attributes(), failed=failed)
        if not call.requests:
            log_call(call, code, quiet=quiet)
