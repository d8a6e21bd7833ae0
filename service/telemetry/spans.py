"""OpenTelemetry traces: a span for each call at a protocol's edge, and in it one for each request for text.

    SERVER    nemoserve.v1.GenerationService/Generate        joins the caller's trace by W3C `traceparent`
    INTERNAL    chat mistral-nemo-12b                        gen_ai.* attributes
    INTERNAL      queue, prefill, decode                     one behind the other

Names are those of the semantic conventions of OpenTelemetry 1.44; those of `gen_ai` are in development there and stand
here as text, so that a newer package does not change what dashboards read. A span's status is ERROR for what is a
fault of the server or comes too late; a caller who goes away or asks for the impossible is no error, but
`error.type` says what happened. What is asked and answered is recorded only on demand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.generation import Delta, GenerationRequest, ToolCallDelta
from service.telemetry.record import Record
from service.text.chat import Conversation, Message, ToolCall

ERRORS = ("unknown", "deadline_exceeded", "unimplemented", "internal", "unavailable", "data_loss")
"""Codes that make a SERVER span an error, by the conventions for gRPC."""
Attributes = Mapping[str, Any]


class Tracing:
    """Makes spans.

    Args:
        content: also record prompts and completions.
    """

    def __init__(self, tracer: Tracer, *, content: bool = False) -> None:
        self._tracer = tracer
        self._propagator = TraceContextTextMapPropagator()
        self._content = content

    def call(self, name: str, headers: Mapping[str, str], attributes: Attributes) -> Span:
        """The SERVER span of a call. What is no proper traceparent makes it the root of a new trace."""
        parent = self._propagator.extract(headers)
        return self._tracer.start_span(name, parent, SpanKind.SERVER, attributes)

    def begin(self, record: Record) -> RequestSpan:
        """The span of a request within its call."""
        call = record.call
        within = None if call is None or call.span is None else set_span_in_context(call.span)
        operation = "chat" if isinstance(record.request.prompt, Conversation) else "text_completion"
        span = self._tracer.start_span(f"{operation} {record.model}", within, start_time=record.began_ns)
        record.trace_id = format(span.get_span_context().trace_id, "032x")
        recorded = span.is_recording()
        if recorded:
            span.set_attributes({"gen_ai.operation.name": operation, **_asked(record)})
        return RequestSpan(self, span, Content(record.request) if self._content and recorded else None)

    def part(self, name: str, parent: Span, began_ns: int, ended_ns: int) -> None:
        """A finished child."""
        self._tracer.start_span(name, set_span_in_context(parent), start_time=began_ns).end(ended_ns)


def end_call(span: Span, code: str, attributes: Attributes, *, failed: bool | None = None) -> None:
    """End the SERVER span of a call.

    Args:
        code: `ok`, a status of HTTP, or how it failed.
        failed: whether that is an error of the server; None: by the conventions for gRPC.
    """
    if span.is_recording():
        span.set_attributes(attributes)
        _set_outcome(span, code, code in ERRORS if failed is None else failed)
    span.end()


class RequestSpan:
    """The span of one request for text.

    Attributes:
        content: collects what is said, None if nobody wants it.
    """

    def __init__(self, tracing: Tracing, span: Span, content: Content | None) -> None:
        self._tracing = tracing
        self._span = span
        self.content = content

    def end(self, record: Record) -> None:
        span, began = self._span, record.began_ns
        ended = began + _ns(record.ended)
        if span.is_recording():
            span.set_attributes(_answered(record))
            if self.content is not None:
                span.set_attributes(self.content.attributes(record.reasons))
            _set_outcome(span, record.code, record.code in ERRORS)
            self._parts(record, began, ended)
        span.end(ended)

    def _parts(self, record: Record, began: int, ended: int) -> None:
        if record.started is None:
            if record.outcome != "rejected":
                self._tracing.part("queue", self._span, began, ended)
            return
        first_token = min(began + _ns(record.first_token), ended)
        scheduled = min(began + _ns(record.started.queue_seconds), first_token)
        self._tracing.part("queue", self._span, began, scheduled)
        self._tracing.part("prefill", self._span, scheduled, first_token)
        self._tracing.part("decode", self._span, first_token, ended)


class Content:
    """What was asked and answered, as the conventions want it: JSON of messages with parts."""

    def __init__(self, request: GenerationRequest) -> None:
        self._prompt = request.prompt
        self._answers: dict[int, Answer] = {}

    def add(self, delta: Delta) -> None:
        self._answers.setdefault(delta.index, Answer()).add(delta)

    def attributes(self, reasons: Sequence[str]) -> Attributes:
        """`reasons` name how completions ended, as far as they did."""
        found: dict[str, Any] = {}
        if isinstance(self._prompt, Conversation):
            found["gen_ai.input.messages"] = _json([_message(each) for each in self._prompt.messages])
        elif isinstance(self._prompt, str):
            found["gen_ai.input.messages"] = _json([_text_message("user", self._prompt)])
        answers = [answer.message for _, answer in sorted(self._answers.items())]
        if len(answers) == len(reasons) == 1:
            answers[0]["finish_reason"] = reasons[0]
        return found | {"gen_ai.output.messages": _json(answers)}


class Answer:
    """One completion, put together from its pieces."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._calls: dict[int, ToolCallDelta] = {}  # as far as they have come

    def add(self, delta: Delta) -> None:
        self._text.append(delta.text)
        for new in delta.tool_calls:
            old = self._calls.get(new.call)
            self._calls[new.call] = new if old is None else replace(old, arguments=old.arguments + new.arguments)

    @property
    def message(self) -> dict[str, Any]:
        calls = [ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in self._calls.values()]
        return _message(Message(role="assistant", content="".join(self._text), tool_calls=tuple(calls)))


def _asked(record: Record) -> Attributes:
    request = record.request
    sampling = request.sampling
    asked: dict[str, Any] = {
        "gen_ai.provider.name": "nemoserve",
        "gen_ai.request.model": record.model,
        "gen_ai.response.id": request.request_id,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
    }
    if not request.until_context:
        asked["gen_ai.request.max_tokens"] = sampling.max_tokens
    if sampling.seed is not None and sampling.seed < 2**63:  # attributes are signed
        asked["gen_ai.request.seed"] = sampling.seed
    if request.n != 1:
        asked["gen_ai.request.choice.count"] = request.n
    return asked


def _answered(record: Record) -> Attributes:
    answered: dict[str, Any] = {"gen_ai.usage.output_tokens": record.generated_tokens}
    if record.reasons:
        answered["gen_ai.response.finish_reasons"] = record.reasons
    if record.started is not None:
        answered |= {
            "gen_ai.response.model": record.model,
            "gen_ai.response.time_to_first_chunk": record.first_token,
            "gen_ai.usage.input_tokens": record.started.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": record.started.cached_tokens,
        }
    return answered


def _set_outcome(span: Span, code: str, failed: bool) -> None:
    if code != "ok" and not code.startswith(("1", "2", "3")):
        span.set_attribute("error.type", code)
    if failed:
        span.set_status(Status(StatusCode.ERROR))


def _message(message: Message) -> dict[str, Any]:
    made = _text_message(message.role, message.content)
    made["parts"] += [
        {"type": "tool_call", "id": call.id, "name": call.name, "arguments": call.arguments}
        for call in message.tool_calls
    ]
    return made


def _text_message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "parts": [{"type": "text", "content": text}]}


def _json(messages: Sequence[Attributes]) -> str:
    return json.dumps(messages, ensure_ascii=False)


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
