"""POST /v1/completions: raw prompts, as text or token ids; what evaluation harnesses measure likelihoods with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request

from engine import TokenLogprob
from service.errors import invalid
from service.generation import MAX_COMPLETIONS, Delta, Finished, GenerationRequest, Started
from service.host import Host
from service.http.openai.logprobs import LegacyLogprobs, LegacyWriter, Spelling
from service.http.openai.parameters import (
    GenerationBody,
    count_of,
    generation_of,
    names_of,
    read_parameters,
    sampling_of,
)
from service.http.openai.run import Account, Usage, finish_reason, request_id_of, run, stop_reason
from service.http.reply import DONE, EventStream, JsonLater, event

INLINE_TOKENS = 4096  # turned into text within a millisecond; more go to a thread


class CompletionBody(GenerationBody, kw_only=True):
    """The body of a request for completions: of one prompt or several, n of each."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None


class CompletionChoice(msgspec.Struct, kw_only=True):
    """Completion number i of prompt p has the index p * n + i."""

    text: str
    index: int
    logprobs: LegacyLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType = UNSET


class Completion(msgspec.Struct, kw_only=True):
    """The whole answer, or one event of a stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that is given back."""

    text: str
    token_ids: list[int]


class Completions:
    """The endpoint."""

    def __init__(self, host: Host, max_body_bytes: int) -> None:
        self._host = host
        self._max_body_bytes = max_body_bytes

    async def create(self, request: Request) -> EventStream | JsonLater:
        body = await read_parameters(request, CompletionBody, self._max_body_bytes)
        prompts, n = prompts_of(body), count_of(body)
        if len(prompts) * n > MAX_COMPLETIONS:
            raise invalid(
                "prompt", f"{len(prompts)} prompts with n {n} must make at most {MAX_COMPLETIONS} completions"
            )
        if body.best_of not in (None, n):
            raise invalid("best_of", f"{body.best_of} must be n ({n}): completions are not ranked")
        answer = _Answer(self._host, body, n, request_id_of(request))
        each = generation_of(
            self._host,
            body,
            request,
            request_id=answer.request_id,
            prompt="",
            sampling=sampling_of(body, **_spelt_otherwise(body)),
        )
        generations = [
            replace(
                each,
                request_id=each.request_id if len(prompts) == 1 else f"{each.request_id}.{number}",
                prompt=await self._encoded(prompt, body),
            )
            for number, prompt in enumerate(prompts)
        ]
        if body.echo:
            for prompt, generation in zip(prompts, generations, strict=True):
                assert isinstance(generation.prompt, list)
                answer.echoes.append(await self._echo(prompt, generation.prompt))
        return EventStream(answer.stream(generations)) if body.stream else JsonLater(answer.whole(generations))

    async def _encoded(self, prompt: str | list[int], body: CompletionBody) -> str | list[int]:
        """A text stays one, unless its tokens are to be seen, or to be others than usual."""
        if isinstance(prompt, str) and (body.echo or body.add_special_tokens is False):
            return await self._host.tokenize(prompt, add_bos=body.add_special_tokens is not False)
        return prompt

    async def _echo(self, prompt: str | list[int], token_ids: list[int]) -> Echo:
        if isinstance(prompt, str):
            return Echo(prompt, token_ids)
        if len(prompt) <= INLINE_TOKENS:
            return Echo(self._host.detokenize(prompt), token_ids)
        return Echo(await asyncio.to_thread(self._host.detokenize, prompt), token_ids)


def prompts_of(body: CompletionBody) -> list[str | list[int]]:
    """A text, texts, token ids, or lists of token ids.

    Raises:
        ServiceError: INVALID_ARGUMENT, a mixture or none at all.
    """
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise invalid("prompt", "must have at least one prompt")
    kinds = {type(each) for each in prompt}
    if len(kinds) > 1:
        raise invalid("prompt", "must be a text, a list of texts, a list of token ids, or a list of such lists")
    if kinds == {int}:
        return [[each for each in prompt if isinstance(each, int)]]
    return [each for each in prompt if not isinstance(each, int)]


def _spelt_otherwise(body: CompletionBody) -> dict[str, object]:
    """Parameters of the engine that completions have another name or meaning for."""
    more: dict[str, object] = {"max_tokens": body.max_tokens, "logprobs": body.logprobs}
    if body.echo and body.max_tokens == 0:
        more["max_tokens"] = 1  # computed, and not shown
    if body.echo and body.logprobs is not None:
        more["prompt_logprobs"] = body.logprobs
        if body.max_tokens in (0, 1):
            more["ignore_eos"] = True  # lm-eval counts on one token after the prompt, whichever it is
    return more


class _Answer:
    """What the client gets of all generations, in pieces or as a whole."""

    def __init__(self, host: Host, body: CompletionBody, n: int, request_id: str) -> None:
        self.request_id = request_id
        self.echoes: list[Echo] = []  # of each prompt, if asked for
        self._host = host
        self._n = n
        self._spelling = Spelling(host, as_ids=bool(body.return_tokens_as_token_ids))
        self._logprobs = body.logprobs is not None
        self._hides_completion = body.max_tokens == 0
        self._account = Account(host, body)
        self._names = names_of(body)
        self._writers: dict[int, LegacyWriter] = {}

    async def stream(self, generations: Sequence[GenerationRequest]) -> AsyncGenerator[bytes]:
        async with aclosing(self._choices(generations)) as choices:
            async for choice in choices:
                yield event(self._completion([choice], self._account.usage_beside(choice=True)))
        if self._account.tells_usage:
            yield event(self._completion([], self._account.usage_beside(choice=False)))
        yield DONE

    async def whole(self, generations: Sequence[GenerationRequest]) -> Completion:
        parts: list[list[CompletionChoice]] = [[] for _ in range(len(generations) * self._n)]
        async with aclosing(self._choices(generations)) as choices:
            async for choice in choices:
                parts[choice.index].append(choice)
        return self._completion([_joined(each) for each in parts], self._account.usage)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(id=f"cmpl-{self.request_id}", choices=choices, usage=usage, **self._account.head)

    async def _choices(self, generations: Sequence[GenerationRequest]) -> AsyncGenerator[CompletionChoice]:
        """The pieces of all choices as they come; the last one of each has its finish_reason."""
        async with aclosing(run(self._host, generations, self._names)) as events:
            async for number, each in events:
                if not (self._hides_completion and isinstance(each, Delta)):
                    self._account.usage.count(each)
                match each:
                    case Started():
                        for index in range(number * self._n, (number + 1) * self._n):
                            if self.echoes:
                                yield self._echoed(index, self.echoes[number], each.prompt_logprobs)
                    case Delta() if not self._hides_completion and (each.text or each.logprobs):
                        index = number * self._n + each.index
                        logprobs = self._writer(index).write(each.logprobs) if self._logprobs else None
                        yield CompletionChoice(text=each.text, index=index, logprobs=logprobs)
                    case Finished():
                        yield CompletionChoice(
                            text="",
                            index=number * self._n + each.index,
                            finish_reason=finish_reason(each),
                            stop_reason=stop_reason(each),
                        )

    def _echoed(self, index: int, echo: Echo, logprobs: list[TokenLogprob]) -> CompletionChoice:
        written = None
        if self._logprobs:
            writer = self._writers[index] = LegacyWriter(self._spelling, self._host, echo.text)
            written = writer.first(echo.token_ids[0])
            written.extend(writer.write(logprobs))
        return CompletionChoice(text=echo.text, index=index, logprobs=written)

    def _writer(self, index: int) -> LegacyWriter:
        if index not in self._writers:
            self._writers[index] = LegacyWriter(self._spelling, self._host)
        return self._writers[index]


def _joined(parts: list[CompletionChoice]) -> CompletionChoice:
    """The pieces of one choice as one."""
    logprobs: LegacyLogprobs | None = None
    for part in parts:
        if part.logprobs is not None:
            logprobs = logprobs or LegacyLogprobs()
            logprobs.extend(part.logprobs)
    last = parts[-1]
    return CompletionChoice(
        text="".join(part.text for part in parts),
        index=last.index,
        logprobs=logprobs,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )
