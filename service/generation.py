"""THE use case: prompt or chat -> tokens -> engine -> text deltas, usage, finish reason.

Every protocol adapter builds one GenerationRequest, calls `Generator.generate`, and translates what it yields:
one Started, Deltas, one Finished per index. Adapters call nothing below this module.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

import msgspec
from msgspec.structs import replace

from engine import (
    AdapterNotFoundError,
    Engine,
    EngineError,
    FinishReason,
    Grammar,
    Request,
    SamplingParams,
    TokenLogprob,
)
from engine.request import MAX_CACHE_SALT, validate_request
from service.errors import from_engine, invalid
from service.streams import interleave
from service.text.answer import AnswerReader
from service.text.chat import Conversation
from service.text.chat import ToolCallDelta as ToolCallDelta
from service.text.stop import StopMatcher
from service.text.tokenizer import TextModel
from service.text.tools.choice import ToolUse, tool_use, without_barred_tools

MAX_COMPLETIONS = 128  # of one request, as the OpenAI API; they share the pages of the prompt
INLINE_CHARACTERS = 4096  # encoded within a few milliseconds; longer texts go to a thread


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One request in protocol-neutral form.

    Attributes:
        prompt: raw text, token ids, or a conversation.
        sampling: engine-level parameters, not yet validated.
        until_context: ignore sampling.max_tokens and generate until the model stops or the context is full.
        n: independent completions; they share nothing but the prompt. With a seed, number i has the stream of seed + i.
        priority: a class; see `engine.Request`.
        cache_salt: keeps what is computed of the prompt from requests with another salt; from other tenants' it is
            kept anyway.
        adapter: name of a LoRA adapter; tokenizer and chat format are the model's own.
        stop: strings that end a completion; the match is cut off unless include_stop.
        tenant: whose request it is; see `service.caller`.
        deadline: on the clock of time.monotonic(); after it nobody waits for the answer. None = no limit.
    """

    request_id: str
    prompt: str | list[int] | Conversation
    sampling: SamplingParams = SamplingParams()
    until_context: bool = False
    n: int = 1
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    priority: int = 0
    adapter: str | None = None
    cache_salt: str = ""
    tenant: str = ""
    deadline: float | None = None


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """The first token is ready. Everything before this point can be retried. `prompt_logprobs`, if asked for, are of
    the prompt's tokens but the first."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    queue_seconds: float
    prompt_logprobs: list[TokenLogprob] = []


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """New text of completion `index`: whole characters; empty while a character or stop string is undecided. What the
    model says as calls of tools is not in `text` but in `tool_calls`. `last`: the completion's Finished follows at
    once, so that an adapter may say both in one message."""

    index: int
    text: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    tool_calls: list[ToolCallDelta] = []
    last: bool = False


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """Completion `index` has ended. `matched_stop` is the stop string or stop token id that ended it; None for end of
    sequence. `tool_calls` is how many it made. Times are seconds since the request arrived."""

    index: int
    reason: FinishReason
    usage: Usage
    matched_stop: str | int | None = None
    tool_calls: int = 0
    error: str | None = None
    queued_seconds: float = 0.0
    first_token_seconds: float = 0.0
    finished_seconds: float = 0.0


GenerationEvent = Started | Delta | Finished


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request in which nothing is wrong, the token ids of its prompt, and what its tools ask of the answer."""

    request: GenerationRequest
    prompt: list[int]
    tools: ToolUse


class Generator:
    """Runs GenerationRequests on one engine with one model's text side. Belongs to the engine's event loop."""

    def __init__(self, engine: Engine, text: TextModel) -> None:
        self._engine = engine
        self._text = text
        tokenizer = text.tokenizer
        self._longest_token = max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent]:
        """Yield one Started, Deltas, and one Finished per index. Closing the iterator early cancels the request.

        Raises:
            ServiceError: before the first event for what is wrong with the request; UNAVAILABLE at any time if the
                engine dies.
        """
        async with aclosing(self.run(await self.prepare(request))) as events:
            async for event in events:
                yield event

    async def prepare(self, request: GenerationRequest) -> Prepared:
        """Token ids of the prompt of a request in which nothing is wrong: it can be run and will end.

        Raises:
            ServiceError: INVALID_ARGUMENT, NOT_FOUND.
        """
        _check(1 <= request.n <= MAX_COMPLETIONS, "n", request.n, f"must be between 1 and {MAX_COMPLETIONS}")
        StopMatcher(request.stop)
        prompt, tools = await self.encode(request.prompt), ToolUse()
        if isinstance(request.prompt, Conversation):
            tools = await self._tool_use(request.prompt, request.sampling.grammar)
            request = dataclasses.replace(request, sampling=_with_tools(request.sampling, tools))
        try:
            validate_request(self._engine_request(0, request, prompt), self._engine.info)
            loaded = [adapter.name for adapter in self._engine.adapters]
            if request.adapter not in (None, *loaded):
                raise AdapterNotFoundError(str(request.adapter), loaded)
        except EngineError as error:
            raise tools.blamed(from_engine(error)) from error
        return Prepared(request, prompt, tools)

    async def run(
        self,
        prepared: Prepared,
        *,
        waited: float = 0.0,
        ended: Callable[[int], None] = lambda index: None,
    ) -> AsyncGenerator[GenerationEvent]:
        """As `generate`, for what `prepare` has returned.

        Args:
            waited: seconds since the request arrived; they count as queued.
            ended: called for each completion as soon as the engine is done with it, whether or not its events have been
                read; perhaps more than once.
        """
        request, began = prepared.request, time.monotonic() - waited
        completions = [
            self._complete(index, prepared, began, waited, functools.partial(ended, index))
            for index in range(request.n)
        ]
        # Logprobs of the prompt are computed once: the first completion says them, and leaves its pages to the others.
        leads = request.sampling.prompt_logprobs is not None
        events = completions[0] if request.n == 1 else _together(completions, leads=leads)
        started = False
        try:
            async with aclosing(events):
                async for event in events:
                    if not isinstance(event, Started):
                        yield event
                    elif not started:
                        started = True
                        yield event
        except EngineError as error:
            raise prepared.tools.blamed(from_engine(error)) from error

    async def encode(self, prompt: str | list[int] | Conversation, *, add_bos: bool = True) -> list[int]:
        """Token ids of a prompt. Long texts are encoded in a thread: the event loop serves everybody. So are
        conversations, because the time that a template takes is not in their length alone.

        Raises:
            ServiceError: INVALID_ARGUMENT; at once for a text that cannot fit into the context, however it is cut.
        """
        if isinstance(prompt, list):
            return prompt
        encode: Callable[[], list[int]]
        in_thread = True
        if isinstance(prompt, Conversation):
            if (chat := self._text.chat) is None:
                raise invalid("chat", "this model has no chat template; send a prompt")
            prompt = without_barred_tools(prompt)
            field, size, encode = "messages", _size(prompt), functools.partial(chat.encode, prompt)
        else:
            field, size, in_thread = "prompt", len(prompt), len(prompt) > INLINE_CHARACTERS
            encode = functools.partial(self._text.tokenizer.encode, prompt, add_bos=add_bos)
        context = self._engine.info.max_model_len
        limit = context * self._longest_token
        _check(size <= limit, field, f"{size} characters", f"cannot fit into the context of {context} tokens")
        return await asyncio.to_thread(encode) if in_thread else encode()

    async def _tool_use(self, conversation: Conversation, answer: Grammar | None) -> ToolUse:
        """What the tools ask of the answer. Where calls are required, all schemas are read to make a grammar of them,
        which takes a second of some megabytes: in a thread, as `encode`."""
        use = functools.partial(tool_use, conversation, self._text.tools, answer)
        return await asyncio.to_thread(use) if conversation.tool_choice == "required" else use()

    def _engine_request(self, index: int, request: GenerationRequest, prompt: list[int]) -> Request:
        sampling, info = request.sampling, self._engine.info
        if index:
            seed = None if sampling.seed is None else (sampling.seed + index) % 2**64
            sampling = replace(sampling, seed=seed, prompt_logprobs=None)
        if not sampling.ignore_eos:
            eos = self._text.tokenizer.eos_id  # a checkpoint may name it nowhere else
            stop_ids = dict.fromkeys((*sampling.stop_token_ids, *self._text.stop_ids, *(() if eos is None else (eos,))))
            sampling = replace(sampling, stop_token_ids=tuple(stop_ids))
        if request.until_context:
            room = min(info.max_model_len, info.kv_pages * info.page_size + 1) - len(prompt)
            sampling = replace(sampling, max_tokens=max(1, room))
        name = request.request_id if request.n == 1 else f"{request.request_id}#{index}"
        return Request(
            request_id=name,
            prompt_token_ids=prompt,
            sampling=sampling,
            priority=request.priority,
            adapter=request.adapter,
            cache_salt=_salt(request),
        )

    async def _complete(
        self, index: int, prepared: Prepared, began: float, waited: float, ended: Callable[[], None]
    ) -> AsyncGenerator[GenerationEvent]:
        """One completion. The engine request is cancelled as soon as a stop string, or the only call, is complete."""
        request, prompt, tools = prepared.request, prepared.prompt, prepared.tools
        stop = StopMatcher(request.stop, include_stop=request.include_stop)
        events = self._engine.generate(self._engine_request(index, request, prompt), ended)
        reader: AnswerReader | None = None  # made when the engine has accepted the prompt's ids
        prompt_logprobs: list[TokenLogprob] = []
        tokens, queued, first_token = 0, 0.0, 0.0
        async with aclosing(events):
            async for event in events:
                prompt_logprobs += event.prompt_logprobs or []
                if not event.token_ids and event.finish_reason is None:
                    continue  # a part of the prompt was computed
                if reader is None:
                    reader = AnswerReader(self._text.tokenizer, prompt[-1:], stop, tools.parser())
                    first_token = time.monotonic() - began
                    queued = waited + (event.timings.queued if event.timings else 0.0)
                    yield Started(
                        request_id=request.request_id,
                        prompt_tokens=len(prompt),
                        cached_tokens=event.cached_tokens,
                        queue_seconds=queued,
                        prompt_logprobs=prompt_logprobs,
                    )
                last = event.finish_reason is not None
                text, ids, calls = reader.push(event.token_ids, last=last)
                tokens += len(ids)
                if reader.ended and not last:
                    await events.aclose()  # now, and not when who reads comes back for more
                    ended()
                if text or ids or calls:
                    logprobs = (event.logprobs or [])[: len(ids)]
                    yield Delta(
                        index=index,
                        text=text,
                        token_ids=ids,
                        logprobs=logprobs,
                        tool_calls=calls,
                        last=last or reader.ended,
                    )
                if last or reader.ended:
                    reason = FinishReason.STOP if reader.ended else event.finish_reason
                    assert reason is not None
                    yield Finished(
                        index=index,
                        reason=reason,
                        usage=Usage(
                            prompt_tokens=len(prompt), completion_tokens=tokens, cached_tokens=event.cached_tokens
                        ),
                        matched_stop=reader.matched_stop or _asked_for(event.stop_token_id, request),
                        tool_calls=reader.calls,
                        error=event.error,
                        queued_seconds=queued,
                        first_token_seconds=first_token,
                        finished_seconds=time.monotonic() - began,
                    )
                    return


def _size(conversation: Conversation) -> int:
    """Characters of text that the prompt will have at least."""
    messages, tools = conversation.messages, conversation.tools
    calls = sum(len(call.arguments) for message in messages for call in message.tool_calls)
    offered = sum(len(tool.description) for tool in tools)  # of a schema the blanks may go
    return sum(len(message.content) for message in messages) + calls + offered


def _with_tools(sampling: SamplingParams, tools: ToolUse) -> SamplingParams:
    """With what the choice of tools demands of the tokens."""
    if tools.grammar is not None:
        sampling = replace(sampling, grammar=tools.grammar)
    if tools.barred is not None:
        sampling = replace(sampling, logit_bias=sampling.logit_bias | {tools.barred: -math.inf})
    return sampling


def _salt(request: GenerationRequest) -> str:
    """Each tenant has a prefix cache of its own: by the time to the first token it could learn what others asked."""
    if not request.tenant or len(request.cache_salt) > MAX_CACHE_SALT:  # which the engine refuses
        return request.cache_salt
    return hashlib.sha256(f"{request.tenant}\n{request.cache_salt}".encode(errors="surrogatepass")).hexdigest()


def _asked_for(token: int | None, request: GenerationRequest) -> int | None:
    """The stop token if the request named it; the model's own ends are nobody's wish."""
    return token if token in request.sampling.stop_token_ids else None


async def _together(
    completions: list[AsyncGenerator[GenerationEvent]], *, leads: bool
) -> AsyncGenerator[GenerationEvent]:
    """Events of several completions as they come. `leads`: see `interleave`."""
    async with aclosing(interleave(completions, leads=leads)) as events:
        async for _, event in events:
            yield event


def _check(ok: bool, field: str, value: object, rule: str) -> None:
    if not ok:
        raise invalid(field, f"{value} {rule}")
