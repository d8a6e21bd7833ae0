"""Runs the generations of one HTTP request, and counts what they cost."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request

from engine import FinishReason
from service.errors import Code, ServiceError
from service.generation import Delta, Finished, GenerationEvent, GenerationRequest, Started
from service.host import Host
from service.http.openai.conversation import as_written
from service.http.openai.parameters import GenerationBody
from service.streams import interleave
from service.version import VERSION

Events = AsyncGenerator[tuple[int, GenerationEvent]]


class CachedTokens(msgspec.Struct):
    cached_tokens: int = 0


class Usage(msgspec.Struct, kw_only=True):
    """Tokens of a request: prompts count once, however many completions they have."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: CachedTokens = msgspec.field(default_factory=CachedTokens)

    def count(self, event: GenerationEvent) -> None:
        """Take an event into account."""
        if isinstance(event, Started):
            self.prompt_tokens += event.prompt_tokens
            self.prompt_tokens_details.cached_tokens += event.cached_tokens
        elif isinstance(event, Delta):
            self.completion_tokens += len(event.token_ids)
        self.total_tokens = self.prompt_tokens + self.completion_tokens


class Account:
    """What an answer says beside its choices: who made it and, where that is asked for, what it cost so far.

    Attributes:
        head: members of the answer, or of each event of a stream.
        usage: counts up while events come.
    """

    def __init__(self, host: Host, body: GenerationBody) -> None:
        self.head: dict[str, Any] = {
            "created": int(time.time()),
            "model": body.model or host.model_name,
            "system_fingerprint": fingerprint(host),
        }
        self.usage = Usage()
        options = body.stream_options
        self._continuous = bool(options and options.continuous_usage_stats)
        self.tells_usage = bool(options and options.include_usage) or self._continuous

    def usage_beside(self, *, choice: bool) -> Usage | msgspec.UnsetType | None:
        """What an event has as usage: with a choice in it, or alone."""
        if not self.tells_usage:
            return msgspec.UNSET
        return self.usage if self._continuous or not choice else None


def request_id_of(request: Request) -> str:
    """Unique, and found in the log by what the client knows: a proxy that tries again sends the same x-request-id."""
    return f"{request.state.request_id}-{secrets.token_hex(4)}"


def fingerprint(host: Host) -> str:
    """Changes when the same seed may give other tokens: with the version, the model and how it is computed."""
    what = msgspec.structs.asdict(host.info) | {"load_seconds": 0, "model": host.model_name, "version": VERSION}
    return "fp_" + hashlib.sha256(msgspec.json.encode(what)).hexdigest()[:10]


async def run(host: Host, requests: Sequence[GenerationRequest], names: Mapping[str, str]) -> Events:
    """Events of all requests as they come, each with the number of its request.

    Args:
        names: see `as_written`.

    Raises:
        ServiceError: a request is refused, or does not end as it should; the others are cancelled.
    """
    try:
        async with aclosing(_run(host, requests)) as events:
            async for each in events:
                yield each
    except ServiceError as error:
        raise as_written(error, names) from error


async def _run(host: Host, requests: Sequence[GenerationRequest]) -> Events:
    streams = [host.generate(request) for request in requests]
    if len(streams) == 1:
        async with aclosing(streams[0]) as events:
            async for event in events:
                yield 0, _checked(event)
        return
    async with aclosing(interleave(streams)) as numbered:
        async for number, event in numbered:
            yield number, _checked(event)


def _checked(event: GenerationEvent) -> GenerationEvent:
    """What OpenAI has no finish_reason for is an error."""
    if isinstance(event, Finished):
        match event.reason:
            case FinishReason.ERROR:
                raise ServiceError(Code.INTERNAL, event.error or "the generation failed")
            case FinishReason.CANCELLED:
                raise ServiceError(Code.UNAVAILABLE, "the request was cancelled by the server")
            case FinishReason.DEADLINE:
                raise ServiceError(Code.DEADLINE_EXCEEDED, "the deadline passed before the answer was complete")
    return event


def finish_reason(event: Finished) -> str:
    if event.tool_calls and event.reason is FinishReason.STOP:
        return "tool_calls"
    return event.reason.value


def stop_reason(event: Finished) -> str | int | msgspec.UnsetType:
    """As in vLLM: the stop string or token that ended the completion."""
    return msgspec.UNSET if event.matched_stop is None else event.matched_stop
