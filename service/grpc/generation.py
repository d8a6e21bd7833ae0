"""The typed API, `nemoserve.v1.GenerationService`: translation between protobuf and `service.generation`."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from typing import Literal

from msgspec.structs import replace
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc

from engine import AdapterInfo, FinishReason, Grammar, SamplingParams, TokenLogprob
from service.caller import CALLER
from service.errors import ServiceError, invalid
from service.generation import Delta, Finished, GenerationEvent, GenerationRequest, Started
from service.grpc.status import Context, abort, deadline_of, metadata_value
from service.host import Host, Phase, info_of
from service.names import MAX_REQUEST_ID, adapter_of, is_request_id
from service.telemetry.telemetry import Telemetry
from service.text.chat import Conversation, Message, Tool, ToolCall
from service.text.check import MAX_MESSAGES, check_counts
from service.version import VERSION

REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}
PHASES = {
    Phase.LOADING: pb.PHASE_LOADING,
    Phase.READY: pb.PHASE_READY,
    Phase.DRAINING: pb.PHASE_DRAINING,
    Phase.FAILED: pb.PHASE_FAILED,
    Phase.UNLOADED: pb.PHASE_UNLOADED,
}
CHOICES: Mapping[int, Literal["auto", "none", "required"]] = {
    pb.TOOL_CHOICE_AUTO: "auto",
    pb.TOOL_CHOICE_NONE: "none",
    pb.TOOL_CHOICE_REQUIRED: "required",
}
_IS_JSON = re.compile(r"\.(parameters|arguments)$")  # fields of tools and calls, named in generation.proto with "_json"
LOAD_INTERVAL_SECONDS = (0.1, 60.0)
PROMPT_LOGPROBS_PER_MESSAGE = 512  # with 20 named tokens each a message has about 200 KB
INLINE_TOKENS = 4096  # turned into text within a millisecond; more go to a thread


class GenerationServicer(rpc.GenerationServiceServicer):
    """See generation.proto for the contract."""

    def __init__(self, host: Host, telemetry: Telemetry | None = None) -> None:
        self._host = host
        self._telemetry = telemetry  # measures what load there was

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        try:
            request_id = _request_id(request, context)
            context.set_trailing_metadata((("x-request-id", request_id),))
            adapter = adapter_of(self._host, request.model, request.adapter)
            generation = to_generation(request, request_id, adapter, deadline_of(context))
            async with aclosing(self._host.generate(generation)) as events:
                async for event in events:
                    for response in self._responses(event, generation.adapter or self._host.model_name):
                        yield response
        except ServiceError as error:
            await abort(context, error.about(_IS_JSON.sub(r".\1_json", error.field or "")))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        try:
            adapter_of(self._host, request.model)
            if (given := request.WhichOneof("input")) is None:
                raise invalid("input", "one of text and chat must be set")
            prompt = _conversation(request.chat) if given == "chat" else request.text
            return pb.TokenizeResponse(token_ids=await self._host.tokenize(prompt, add_bos=request.add_special_tokens))
        except ServiceError as error:
            await abort(context, error)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        try:
            adapter_of(self._host, request.model)
            ids = list(request.token_ids)
            inline = len(ids) <= INLINE_TOKENS
            text = self._host.detokenize(ids) if inline else await asyncio.to_thread(self._host.detokenize, ids)
            return pb.DetokenizeResponse(text=text)
        except ServiceError as error:
            await abort(context, error)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        try:
            return pb.ListModelsResponse(models=[self._model(), *(self._model(name) for name in self._loras)])
        except ServiceError as error:
            await abort(context, error)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        try:
            return pb.GetModelResponse(model=self._model(adapter_of(self._host, request.model)))
        except ServiceError as error:
            await abort(context, error)

    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.GetLoadResponse:
        return pb.GetLoadResponse(load=self._load())

    async def WatchLoad(self, request: pb.WatchLoadRequest, context: Context) -> AsyncIterator[pb.WatchLoadResponse]:
        low, high = LOAD_INTERVAL_SECONDS
        interval = request.interval_seconds or 1.0
        if not low <= interval <= high:
            await abort(context, invalid("interval_seconds", f"{interval} must be between {low:g} and {high:g}, or 0"))
        async with aclosing(self._host.watch(interval)) as changes:
            async for _ in changes:
                yield pb.WatchLoadResponse(load=self._load())

    @property
    def _loras(self) -> Mapping[str, AdapterInfo]:
        return {} if self._host.loras is None else self._host.loras.loaded

    def _responses(self, event: GenerationEvent, model: str) -> Iterator[pb.GenerateResponse]:
        match event:
            case Started():
                started = pb.Started(
                    request_id=event.request_id,
                    model=model,
                    prompt_tokens=event.prompt_tokens,
                    cached_tokens=event.cached_tokens,
                    queue_seconds=event.queue_seconds,
                )
                yield pb.GenerateResponse(started=started)
                for at in range(0, len(event.prompt_logprobs), PROMPT_LOGPROBS_PER_MESSAGE):
                    part = event.prompt_logprobs[at : at + PROMPT_LOGPROBS_PER_MESSAGE]
                    logprobs = pb.PromptLogprobs(logprobs=[self._logprob(each) for each in part])
                    yield pb.GenerateResponse(prompt_logprobs=logprobs)
            case Delta():
                response = pb.GenerateResponse()
                delta = response.delta
                delta.SetInParent()
                delta.index, delta.text = event.index, event.text
                delta.token_ids.extend(event.token_ids)
                if event.logprobs:
                    delta.logprobs.extend([self._logprob(each) for each in event.logprobs])
                for each in event.tool_calls:
                    delta.tool_calls.add(call=each.call, id=each.id, name=each.name, arguments_json=each.arguments)
                yield response
            case Finished():
                yield pb.GenerateResponse(finished=_finished(event))

    def _logprob(self, logprob: TokenLogprob) -> pb.TokenLogprob:
        return pb.TokenLogprob(
            token_id=logprob.token_id,
            token=self._host.token_bytes(logprob.token_id),
            logprob=logprob.logprob,
            rank=logprob.rank,
            top=[
                pb.TopLogprob(token_id=token, token=self._host.token_bytes(token), logprob=value)
                for token, value in logprob.top
            ],
        )

    def _model(self, adapter: str | None = None) -> pb.Model:
        info, lora = self._host.info, self._loras.get(adapter or "")
        return pb.Model(
            name=lora.name if lora else self._host.model_name,
            aliases=() if lora else self._host.model_aliases,
            base_model=self._host.model_name if lora else "",
            lora_rank=lora.rank if lora else 0,
            architecture=info.architecture,
            parameters=info.num_parameters,
            dtype=info.dtype,
            max_model_len=info.max_model_len,
            vocab_size=info.vocab_size,
            chat=self._host.has_chat,
        )

    def _load(self) -> pb.Load:
        status, stats, queue = self._host.status, self._host.stats, self._host.queue
        load = pb.Load(
            phase=PHASES[status.phase],
            progress=status.progress,
            eta_seconds=status.eta_seconds or 0.0,
            queued_requests=stats.queued,
            queued_tokens=stats.queued_tokens,
            oldest_queued_seconds=stats.oldest_queued_seconds,
            running_requests=stats.running,
            capacity=stats.max_batch_size,
            kv_pages_used=stats.kv_pages_used,
            kv_pages_total=stats.kv_pages_total,
            prefill_tokens_per_second=stats.prefill_tokens_per_second,
            decode_tokens_per_second=stats.decode_tokens_per_second,
            started_at=self._host.started_at,
            engine_version=VERSION,
            step_base_seconds=stats.step_cost.base,
            seconds_per_prefill_token=stats.step_cost.per_prefill_token,
            seconds_per_decode_row=stats.step_cost.per_decode_row,
            seconds_per_context_token=stats.step_cost.per_context_token,
            steps=stats.steps,
            prompt_tokens=stats.prompt_tokens,
            generated_tokens=stats.generated_tokens,
            prefix_cache_query_tokens=stats.prefix_cache_query_tokens,
            prefix_cache_hit_tokens=stats.prefix_cache_hit_tokens,
            preemptions=stats.preemptions,
            detail=status.detail,
            arrived_requests=queue.arrived,
            arrived_prompt_tokens=queue.arrived_tokens,
            finished_requests=queue.finished,
        )
        if (info := info_of(self._host)) is not None:
            load.kv_page_tokens, load.max_step_tokens = info.page_size, info.max_batch_tokens
        if self._telemetry is not None:
            waits, gaps = self._telemetry.first_tokens, self._telemetry.per_token
            load.time_to_first_token.MergeFrom(pb.Histogram(bounds=waits.bounds, counts=waits.counts))
            load.time_per_output_token.MergeFrom(pb.Histogram(bounds=gaps.bounds, counts=gaps.counts))
        return load


def to_generation(
    request: pb.GenerateRequest, request_id: str, adapter: str | None = None, deadline: float | None = None
) -> GenerationRequest:
    """The protocol-neutral form of a request of the current caller, for the LoRA adapter that it means.

    Raises:
        ServiceError: INVALID_ARGUMENT for a missing input.
    """
    sampling = request.sampling
    return GenerationRequest(
        request_id=request_id,
        prompt=_prompt(request),
        sampling=replace(_sampling(sampling), grammar=_grammar(request.response_format)),
        until_context=not sampling.HasField("max_tokens"),
        n=sampling.n if sampling.HasField("n") else 1,
        stop=tuple(sampling.stop),
        include_stop=sampling.include_stop,
        priority=request.priority,
        adapter=adapter,
        cache_salt=request.cache_salt,
        tenant=CALLER.get().tenant,
        deadline=deadline,
    )


def _request_id(request: pb.GenerateRequest, context: Context) -> str:
    """The client's own, from the message or the metadata, or a new one.

    Raises:
        ServiceError: INVALID_ARGUMENT, it could not be sent back in a header.
    """
    given = request.request_id or metadata_value(context, "x-request-id")
    if not given:
        return secrets.token_hex(8)
    if not is_request_id(given):
        rule = f"must be printable ASCII of at most {MAX_REQUEST_ID} characters"
        raise invalid("request_id", f"{given[:80]!r} ({len(given)} characters) {rule}")
    return given


def _prompt(request: pb.GenerateRequest) -> str | list[int] | Conversation:
    match request.WhichOneof("input"):
        case "prompt":
            return request.prompt
        case "token_ids":
            return list(request.token_ids.ids)
        case "chat":
            return _conversation(request.chat)
        case _:
            raise invalid("input", "one of prompt, token_ids and chat must be set")


def _conversation(chat: pb.Chat) -> Conversation:
    """
    Raises:
        ServiceError: INVALID_ARGUMENT, it is too much, or a choice of tools that does not exist or contradicts itself.
    """
    calls = sum(len(message.tool_calls) for message in chat.messages[: MAX_MESSAGES + 1])
    check_counts(messages=len(chat.messages), calls=calls, tools=len(chat.tools))
    unset = pb.TOOL_CHOICE_REQUIRED if chat.tool_name else pb.TOOL_CHOICE_AUTO
    choice = CHOICES.get(chat.tool_choice or unset)
    if choice is None:
        raise invalid("tool_choice", f"{chat.tool_choice} is none of {', '.join(map(str, CHOICES))}")
    if chat.tool_name and choice != "required":
        raise invalid("tool_name", f"{chat.tool_name[:80]!r} goes with tool_choice REQUIRED")
    return Conversation(
        messages=tuple(
            Message(
                role=message.role,
                content=message.content,
                tool_calls=tuple(
                    ToolCall(id=call.id, name=call.name, arguments=call.arguments_json) for call in message.tool_calls
                ),
                tool_call_id=message.tool_call_id or None,
            )
            for message in chat.messages
        ),
        tools=tuple(
            Tool(name=tool.name, description=tool.description, parameters=tool.parameters_json or "{}")
            for tool in chat.tools
        ),
        tool_choice=choice,
        tool_name=chat.tool_name or None,
        parallel_tool_calls=chat.parallel_tool_calls if chat.HasField("parallel_tool_calls") else True,
        continue_final_message=chat.continue_final_message,
    )


def _sampling(sampling: pb.SamplingParameters) -> SamplingParams:
    scalars = (
        *("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
        *("presence_penalty", "frequency_penalty", "seed", "logprobs", "prompt_logprobs"),
    )
    return SamplingParams(
        **{name: getattr(sampling, name) for name in scalars if sampling.HasField(name)},  # type: ignore[arg-type]
        logit_bias=dict(sampling.logit_bias),
        stop_token_ids=tuple(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
    )


def _grammar(form: pb.ResponseFormat) -> Grammar | None:
    match form.WhichOneof("format"):
        case "json":
            return Grammar(kind="json_object") if form.json else None
        case "json_schema":
            return Grammar(kind="json_schema", text=form.json_schema)
        case "regex":
            return Grammar(kind="regex", text=form.regex)
        case "grammar":
            return Grammar(kind="lark", text=form.grammar)
        case _:
            return None


def _finished(event: Finished) -> pb.Finished:
    finished = pb.Finished(
        index=event.index,
        reason=REASONS[event.reason],
        usage=pb.Usage(
            prompt_tokens=event.usage.prompt_tokens,
            completion_tokens=event.usage.completion_tokens,
            cached_tokens=event.usage.cached_tokens,
        ),
        timings=pb.Timings(
            queued=event.queued_seconds, first_token=event.first_token_seconds, finished=event.finished_seconds
        ),
        error=event.error or "",
        tool_calls=event.tool_calls,
    )
    if isinstance(event.matched_stop, str):
        finished.stop = event.matched_stop
    elif event.matched_stop is not None:
        finished.stop_token_id = event.matched_stop
    return finished
