"""Runs the generations of one HTTP request, and counts what they cost."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

import msgspec
from starlette.requests import Request

from engine import FinishReason
from service.errors import Code, ServiceError
from service.generation import Delta, Finished, GenerationEvent, GenerationRequest, Started
from service.host import Host
from service.http.openai.conversation import as_written
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
    pending = {asyncio.ensure_future(anext(stream, None)): number for number, stream in enumerate(streams)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in [each for each in pending if each in done]:
                number = pending.pop(task)
                if (each := task.result()) is not None:
                    yield number, _checked(each)
                    pending[asyncio.ensure_future(anext(streams[number], None))] = number
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


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
