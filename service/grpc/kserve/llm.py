"""One served language model under the tensor names of Triton's two LLM backends.

This module is what the two views share: a request becomes an `Ask`, the generation runs, its events are gathered into
responses. `vllm.py` and `trtllm.py` know the names.
"""

from __future__ import annotations

import asyncio
import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

from engine import FinishReason, TokenLogprob
from engine.request import MAX_LOGIT_BIAS
from service.errors import Code, ServiceError, invalid
from service.generation import MAX_COMPLETIONS, Delta, Finished, GenerationEvent, GenerationRequest, Started
from service.grpc.kserve.model import LOADING, READY, UNAVAILABLE, Array, InferRequest, InferResult, ModelSpec
from service.grpc.kserve.values import Inputs, conversation, shown
from service.host import Host, Phase
from service.text.chat import Conversation

EVENTS_AHEAD = 8  # taken from the generation while a response waits to be written
NORMAL_PRIORITY = 2  # Triton counts from 1 = highest; 0 = unset is as good as this


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request in our terms.

    Attributes:
        wants: names of the inputs that ask for more outputs than the text and are true.
        single: the answer must be one response.
        has_logprobs: the sampling parameters ask for logprobs.
        prefix: goes before a whole answer.
    """

    generation: GenerationRequest
    stream: bool
    wants: frozenset[str]
    single: bool = False
    has_logprobs: bool = False
    prefix: str = ""


@dataclass(slots=True)
class Completion:
    """What one completion has added since the last response, and its running sum of log probabilities."""

    index: int
    changed: bool = False
    text: str = ""
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    reason: FinishReason | None = None

    def add(self, event: Delta) -> None:
        self.changed = True
        self.text += event.text
        self.tokens += len(event.token_ids)
        if event.logprobs:
            self.logprobs += event.logprobs
            self.cumulative_logprob += sum(entry.logprob for entry in event.logprobs)

    def end(self, event: Finished) -> None:
        """Raises ServiceError: it did not end well."""
        self.changed = True
        if event.reason is FinishReason.ERROR:
            raise ServiceError(Code.INTERNAL, event.error or "the generation failed")
        if event.reason is FinishReason.CANCELLED:
            raise ServiceError(Code.UNAVAILABLE, "Request was cancelled")
        if event.reason is FinishReason.DEADLINE:
            raise ServiceError(Code.DEADLINE_EXCEEDED, "the deadline passed before the answer was complete")
        self.reason = event.reason

    def clear(self) -> None:
        self.changed, self.text, self.tokens, self.logprobs = False, "", 0, []


class LlmModel(ABC):
    """One name of the served model."""

    def __init__(self, host: Host, spec: ModelSpec) -> None:
        self._host = host
        self._spec = spec

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def state(self) -> tuple[str, str]:
        status = self._host.status
        if status.phase is Phase.READY and self._host.alive:
            return READY, ""
        reason = status.detail or (status.phase.value if status.phase is not Phase.READY else "engine not responding")
        return (LOADING if status.phase is Phase.LOADING else UNAVAILABLE), reason

    @property
    def accepts(self) -> bool:
        return self._host.accepting

    @abstractmethod
    async def ask(self, request: InferRequest) -> Ask:
        """Translate the request.

        Raises:
            ServiceError: INVALID_ARGUMENT naming the tensor or parameter.
        """

    @abstractmethod
    def outputs(self, ask: Ask, completions: list[Completion], prompt_tokens: int) -> list[Mapping[str, Array]]:
        """Output tensors of the next responses, one mapping each: at least one, and just one if `ask.single`. The
        completions hold what is new."""

    async def infer(self, request: InferRequest) -> AsyncGenerator[InferResult]:
        """Responses as the text comes when streaming, else when it is complete. The last is marked final."""
        ask = await self.ask(request)
        completions = [Completion(index) for index in range(ask.generation.n)]
        prompt_tokens, queued, running = 0, 0.0, len(completions)
        gather = batches if ask.generation.n > 1 else batches_of_one
        async with aclosing(gather(self._host.generate(ask.generation), request.timeout)) as arriving:
            async for events in arriving:
                changed = False
                for event in events:
                    if isinstance(event, Delta):
                        completions[event.index].add(event)
                        changed = True
                    elif isinstance(event, Started):
                        prompt_tokens, queued = event.prompt_tokens, event.queue_seconds
                    else:
                        completions[event.index].end(event)
                        running -= 1
                        changed = True
                if running and not (ask.stream and changed):
                    continue
                responses = self.outputs(ask, completions, prompt_tokens)
                for left, response in zip(reversed(range(len(responses))), responses, strict=True):
                    yield InferResult(outputs=response, final=not running and left == 0, queued_seconds=queued)
                for completion in completions:
                    completion.clear()

    # -- for the views -----------------------------------------------------------------------------------------

    def request_id(self, request: InferRequest) -> str:
        """Unique in the engine: clients choose their ids without knowing of one another."""
        return f"{request.id or 'kserve'}~{secrets.token_hex(8)}"

    def prompt(self, inputs: Inputs, parameters: Mapping[str, object]) -> str | Conversation:
        """Text of `text_input`, or the chat of the `messages` tensor or parameter."""
        text: str = inputs.one("text_input", "")
        messages = inputs.one("messages", parameters.get("messages"))
        if messages is None:
            if not text:
                raise invalid("text_input", "is empty; a prompt needs at least one character")
            return text
        if text:
            raise invalid("messages", "cannot stand beside a text_input that is not empty")
        if not isinstance(messages, str):
            raise invalid("messages", f"{shown(messages)} must be JSON text")
        if not self._host.has_chat and self._host.status.phase is Phase.READY:
            raise invalid("messages", "this model has no chat template; send text_input")
        return conversation("messages", messages)

    async def banned_tokens(self, field_name: str, words: tuple[str, ...], *, both_spacings: bool) -> dict[int, float]:
        """Logit biases that make words impossible. Only words of one token can be banned.

        Args:
            both_spacings: also ban the word after a space, as vLLM does.
        """
        if len(words) > MAX_LOGIT_BIAS:
            raise invalid(field_name, f"{len(words)} words must be at most {MAX_LOGIT_BIAS}")
        banned: dict[int, float] = {}
        for word in words:
            spellings = (word.lstrip(), " " + word.lstrip()) if both_spacings else (word,)
            encoded = [await self._host.tokenize(spelling) for spelling in spellings]
            banned |= {tokens[0]: float("-inf") for tokens in encoded if len(tokens) == 1}
            for spelling, tokens in zip(spellings, encoded, strict=True):
                if not any(token in banned for token in tokens):
                    raise invalid(
                        field_name,
                        f"{shown(spelling)} takes {len(tokens)} tokens; only words of one token can be banned",
                    )
        return banned


def count(field_name: str, value: int) -> int:
    """A number of completions, checked before anything is made for each of them."""
    if not 1 <= value <= MAX_COMPLETIONS:
        raise invalid(field_name, f"{value} must be between 1 and {MAX_COMPLETIONS}")
    return value


def priority(value: int) -> int:
    """Triton's priority (1 = highest, 0 = unset) as ours (lower runs first, 0 = normal)."""
    return value - NORMAL_PRIORITY if value else 0


@dataclass(frozen=True, slots=True)
class _End:
    error: Exception | None


async def batches_of_one(
    events: AsyncGenerator[GenerationEvent], first_within: float | None
) -> AsyncGenerator[list[GenerationEvent]]:
    """As `batches`, for a request with one completion: without a task and a queue, of which it has no need. A slow
    reader finds in the next event whatever the engine has made meanwhile.
    """
    async with aclosing(events):
        try:
            async with asyncio.timeout(first_within):
                event = await anext(events, None)
        except TimeoutError:
            raise _too_late() from None
        while event is not None:
            batch = [event]
            if isinstance(event, Delta) and event.last:
                event = await anext(events)
                batch.append(event)
            if isinstance(event, Finished):
                await anext(events, None)  # the generation ends before its last response is written
            yield batch
            event = await anext(events, None)


async def batches(
    events: AsyncGenerator[GenerationEvent], first_within: float | None
) -> AsyncGenerator[list[GenerationEvent]]:
    """Events that are there already come together: Finished joins the last Delta, and a slow reader gets fewer and
    longer pieces of text. At most EVENTS_AHEAD wait; then the generation does.

    Args:
        first_within: longest wait for the first event in seconds, None = no limit.

    Raises:
        ServiceError: UNAVAILABLE in Triton's words when the timeout has passed.
    """
    queue: asyncio.Queue[GenerationEvent | _End] = asyncio.Queue(EVENTS_AHEAD)

    async def pump() -> None:
        failure: Exception | None = None
        try:
            async with aclosing(events):
                async for event in events:
                    await queue.put(event)
        except Exception as error:  # raised where the events are read
            failure = error
        await queue.put(_End(failure))

    task = asyncio.create_task(pump())
    try:
        try:
            item = await asyncio.wait_for(queue.get(), first_within)
        except TimeoutError:
            raise _too_late() from None
        while True:
            batch: list[GenerationEvent] = []
            while not isinstance(item, _End):
                batch.append(item)
                if queue.empty():
                    break
                item = queue.get_nowait()
            if batch:
                yield batch
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            item = await queue.get()
    finally:
        task.cancel()
        await asyncio.wait([task])


def _too_late() -> ServiceError:
    return ServiceError(Code.UNAVAILABLE, "Request timeout expired")
