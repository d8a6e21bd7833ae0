"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request

from service.errors import invalid
from service.generation import Delta, Finished, GenerationRequest, Started, ToolCallDelta
from service.host import Host
from service.http.openai.conversation import ChatMessage, ChatTool, NamedTool, conversation_of
from service.http.openai.logprobs import ChatLogprobs, Spelling
from service.http.openai.parameters import (
    GenerationBody,
    generation_of,
    names_of,
    read_parameters,
    sampling_of,
)
from service.http.openai.run import Account, Usage, finish_reason, request_id_of, run, stop_reason
from service.http.reply import DONE, EventStream, JsonLater, event


class ChatBody(GenerationBody, kw_only=True):
    """The body of a request for a chat completion."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[ChatTool] | None = None
    tool_choice: str | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class FunctionDelta(msgspec.Struct, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str = ""


class CallDelta(msgspec.Struct, kw_only=True, omit_defaults=False):
    """Piece of a tool call in a chunk, or, without index, a whole one in a message."""

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionDelta


class ChatDelta(msgspec.Struct, kw_only=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    refusal: UnsetType | None = UNSET
    tool_calls: list[CallDelta] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType = UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    """One event of a stream."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class AnswerMessage(msgspec.Struct, kw_only=True):
    role: str = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[CallDelta] | UnsetType = UNSET


class AnswerChoice(msgspec.Struct, kw_only=True):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str
    stop_reason: str | int | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    """The whole answer. `stop_reason`, as in vLLM, is the stop string or token that ended it."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[AnswerChoice]
    usage: Usage


class ChatCompletions:
    """The endpoint."""

    def __init__(self, host: Host, max_body_bytes: int) -> None:
        self._host = host
        self._max_body_bytes = max_body_bytes

    async def create(self, request: Request) -> EventStream | JsonLater:
        body = await read_parameters(request, ChatBody, self._max_body_bytes)
        generation = to_generation(self._host, body, request)
        answer = _Answer(self._host, body, generation)
        return EventStream(answer.stream()) if body.stream else JsonLater(answer.whole())


def to_generation(host: Host, body: ChatBody, request: Request) -> GenerationRequest:
    """The protocol-neutral form of a request.

    Raises:
        ServiceError: INVALID_ARGUMENT, NOT_FOUND.
    """
    if not body.messages:
        raise invalid("messages", "must have at least one message")
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "does not go without logprobs: true")
    if body.add_generation_prompt is not None and body.add_generation_prompt == bool(body.continue_final_message):
        raise invalid("add_generation_prompt", "must be the opposite of continue_final_message")
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if body.max_tokens not in (None, max_tokens):
        raise invalid("max_tokens", f"{body.max_tokens} contradicts max_completion_tokens, which is {max_tokens}")
    return generation_of(
        host,
        body,
        request,
        request_id=request_id_of(request),
        prompt=conversation_of(
            body.messages,
            body.tools or [],
            body.tool_choice,
            parallel=body.parallel_tool_calls is not False,
            continue_final=bool(body.continue_final_message),
        ),
        sampling=sampling_of(body, max_tokens=max_tokens, logprobs=(body.top_logprobs or 0) if body.logprobs else None),
        until_context=max_tokens is None,
    )


class _Answer:
    """What the client gets of one generation, in pieces or as a whole."""

    def __init__(self, host: Host, body: ChatBody, generation: GenerationRequest) -> None:
        self._n = generation.n
        self._events = run(host, [generation], {"prompt": "messages"} | names_of(body))
        self._spelling = Spelling(host, as_ids=bool(body.return_tokens_as_token_ids))
        self._logprobs = bool(body.logprobs)
        self._account = Account(host, body)
        self._id = f"chatcmpl-{generation.request_id}"

    async def stream(self) -> AsyncGenerator[bytes]:
        async with aclosing(self._events) as events:
            async for _, each in events:
                self._account.usage.count(each)
                match each:
                    case Started():
                        for index in range(self._n):
                            first = ChatDelta(role="assistant", content="", refusal=None)
                            yield self._chunk(ChunkChoice(index=index, delta=first))
                    case Delta() if each.text or each.tool_calls or (self._logprobs and each.logprobs):
                        yield self._chunk(self._delta(each))
                    case Finished():
                        yield self._chunk(
                            ChunkChoice(
                                index=each.index,
                                delta=ChatDelta(),
                                finish_reason=finish_reason(each),
                                stop_reason=stop_reason(each),
                            )
                        )
        if self._account.tells_usage:
            yield self._chunk(None)
        yield DONE

    def _delta(self, delta: Delta) -> ChunkChoice:
        calls = [_call_piece(each) for each in delta.tool_calls] or UNSET
        content = UNSET if calls and not delta.text else delta.text
        logprobs = self._spelling.chat(delta.logprobs) if self._logprobs else None
        return ChunkChoice(index=delta.index, delta=ChatDelta(content=content, tool_calls=calls), logprobs=logprobs)

    def _chunk(self, choice: ChunkChoice | None) -> bytes:
        """An event with one choice, or with the usage alone."""
        usage = self._account.usage_beside(choice=choice is not None)
        choices = [] if choice is None else [choice]
        return event(ChatChunk(id=self._id, choices=choices, usage=usage, **self._account.head))

    async def whole(self) -> ChatCompletion:
        choices = [_Choice(index) for index in range(self._n)]
        async with aclosing(self._events) as events:
            async for _, each in events:
                self._account.usage.count(each)
                if not isinstance(each, Started):
                    choices[each.index].add(each)
        return ChatCompletion(
            id=self._id,
            choices=[choice.done(self._spelling if self._logprobs else None) for choice in choices],
            usage=self._account.usage,
            **self._account.head,
        )


class _Choice:
    """One completion, while it is gathered."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._deltas: list[Delta] = []
        self._end: Finished | None = None

    def add(self, event: Delta | Finished) -> None:
        if isinstance(event, Finished):
            self._end = event
        else:
            self._deltas.append(event)

    def done(self, spelling: Spelling | None) -> AnswerChoice:
        assert self._end is not None, "every completion has an end"
        text = "".join(delta.text for delta in self._deltas)
        calls = _whole_calls([piece for delta in self._deltas for piece in delta.tool_calls])
        logprobs = [each for delta in self._deltas for each in delta.logprobs]
        return AnswerChoice(
            index=self._index,
            message=AnswerMessage(content=text if text or not calls else None, tool_calls=calls or UNSET),
            logprobs=None if spelling is None else spelling.chat(logprobs),
            finish_reason=finish_reason(self._end),
            stop_reason=stop_reason(self._end),
        )


def _call_piece(piece: ToolCallDelta) -> CallDelta:
    """The first piece of a call, which has its name, brings id and type too."""
    if piece.name:
        function = FunctionDelta(name=piece.name, arguments=piece.arguments)
        return CallDelta(index=piece.call, id=piece.id, type="function", function=function)
    return CallDelta(index=piece.call, function=FunctionDelta(arguments=piece.arguments))


def _whole_calls(pieces: list[ToolCallDelta]) -> list[CallDelta]:
    calls: dict[int, CallDelta] = {}
    for piece in pieces:
        if piece.call not in calls:
            function = FunctionDelta(name=piece.name, arguments=piece.arguments)
            calls[piece.call] = CallDelta(id=piece.id, type="function", function=function)
        else:
            calls[piece.call].function.arguments += piece.arguments
    return [calls[number] for number in sorted(calls)]
