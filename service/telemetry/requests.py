"""Watches requests on their way through the served model: counts them, logs a line for each, and traces them.

    arrival ── queue ──► first step ── prefill ──► first token ── decode ──► end

Times are those at which events are handed on, so that of a reader who falls behind they tell what he gets.
"""

from __future__ import annotations

import time

from engine import FinishReason
from service.errors import Code, ServiceError
from service.generation import Delta, Finished, GenerationEvent, GenerationRequest, Started
from service.host import Host
from service.telemetry.access import log_request
from service.telemetry.calls import CALL
from service.telemetry.metrics import Metrics
from service.telemetry.record import Record
from service.telemetry.spans import RequestSpan, Tracing

REASONS = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.CANCELLED, FinishReason.DEADLINE, FinishReason.ERROR)
"""Of a request with several completions the last of these counts."""
CODES = {
    FinishReason.CANCELLED: "cancelled",
    FinishReason.DEADLINE: "deadline_exceeded",
    FinishReason.ERROR: "internal",
}

MAX_NAME = 128  # characters of a model's name that are told of: clients may send any, and adapters have no longer ones


class Requests:
    """See `service.observer.Observer`. Belongs to one event loop.

    Args:
        tracing: None while nobody traces.
    """

    def __init__(self, host: Host, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self._host = host
        self._metrics = metrics
        self._tracing = tracing

    def begin(self, request: GenerationRequest) -> WatchedRequest:
        call = CALL.get()
        if call is not None:
            call.requests += 1
        record = Record(request, (request.adapter or self._host.model_name)[:MAX_NAME], call)
        span = None if self._tracing is None else self._tracing.begin(record)
        return WatchedRequest(record, self._metrics, span)


class WatchedRequest:
    """See `service.observer.Observation`."""

    def __init__(self, record: Record, metrics: Metrics, span: RequestSpan | None) -> None:
        self._record = record
        self._metrics = metrics
        self._numbers = metrics.of(record.model)
        self._span = span
        self._reasons: list[FinishReason] = []
        self._last: dict[int, float] = {}  # of each completion: when it got its last token
        self._numbers.waiting += 1

    def event(self, event: GenerationEvent) -> None:
        if isinstance(event, Delta):
            self._tokens(event)
        elif isinstance(event, Finished):
            self._finish(event)
        else:
            self._start(event)

    def failed(self, error: Exception) -> None:
        code = error.code if isinstance(error, ServiceError) else Code.INTERNAL
        if code is Code.DEADLINE_EXCEEDED:
            outcome = "deadline"
        elif self._record.started is not None or code is Code.INTERNAL:
            outcome = "error"
        else:
            outcome = "rejected"
            if code is not Code.RESOURCE_EXHAUSTED:  # admission says more exactly why
                self._metrics.rejected[code.value] += 1
        self._end(outcome, code.value)

    def close(self) -> None:
        self._end("cancelled", "cancelled")

    def _start(self, started: Started) -> None:
        numbers, record = self._numbers, self._record
        record.started = started
        record.first_token = time.monotonic() - record.began
        numbers.waiting -= 1
        numbers.running += 1
        numbers.first_token.add(record.first_token)
        numbers.queue.add(started.queue_seconds)
        numbers.prefill.add(max(0.0, record.first_token - started.queue_seconds))
        numbers.prompt_tokens += started.prompt_tokens
        numbers.cached_tokens += started.cached_tokens

    def _tokens(self, delta: Delta) -> None:
        """Tokens that come together share the time since the one before them; behind the first there is none."""
        if self._span is not None and self._span.content is not None:
            self._span.content.add(delta)
        if (count := len(delta.token_ids)) == 0:
            return
        now = time.monotonic()
        self._record.generated_tokens += count
        self._numbers.generated_tokens += count
        last = self._last.get(delta.index)
        self._last[delta.index] = now
        if last is None:
            gap, count = 0.0, count - 1
        else:
            gap = (now - last) / count
        if count:
            self._numbers.between_tokens.add(gap, count)
            self._record.between_tokens.add(gap, count)

    def _finish(self, finished: Finished) -> None:
        self._reasons.append(finished.reason)
        self._record.reasons.append(finished.reason.value)
        if len(self._reasons) == self._record.request.n:
            worst = max(self._reasons, key=REASONS.index)
            self._end(worst.value, CODES.get(worst, "ok"))

    def _end(self, outcome: str, code: str) -> None:
        numbers, record = self._numbers, self._record
        if record.outcome:
            return
        record.outcome, record.code = outcome, code
        record.ended = time.monotonic() - record.began
        numbers.outcomes[outcome] += 1
        if record.started is None:
            numbers.waiting -= 1
        else:
            numbers.running -= 1
            numbers.duration.add(record.ended)
            numbers.decode.add(record.ended - record.first_token)
            if (gaps := sum(record.between_tokens.counts)) > 0:
                numbers.per_token.add(record.between_tokens.sum / gaps)
        if self._span is not None:
            self._span.end(record)
        log_request(record)
