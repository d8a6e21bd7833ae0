"""An engine without a model, progress that a test holds in its hand, and a small but real text side for it.

The vocabulary is 256 bytes and four more ids: `<s>`, `</s>`, `<|end|>`, and one that only the engine has (checkpoints
pad their embedding matrix to a round size). So a prompt is its UTF-8 bytes, and an answer is any list of ids.

    engine = FakeEngine(b"Hello")              # every request gets these tokens, one per event
    engine.gate = Gate()                       # … and each token waits for gate.allow()
    await engine.until(lambda: engine.cancelled == ["id"])
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, Callable, Sequence

from engine import (
    AdapterInfo,
    AdapterNotFoundError,
    EngineDeadError,
    EngineError,
    EngineInfo,
    EngineStats,
    FinishReason,
    Request,
    Timings,
    TokenEvent,
    TokenLogprob,
    Vocabulary,
)
from engine.mailbox import merge
from engine.request import validate_request
from service.text.bpe import BpeTokenizer
from service.text.template import TemplateChat
from service.text.tokenizer import TextModel
from service.text.tools.hermes import HermesTools
from tests.service.fakes import Gate

BOS, EOS, END, PADDING = 256, 257, 258, 259
INFO = EngineInfo(
    vocab_size=260,
    max_model_len=128,
    max_batch_size=8,
    max_batch_tokens=64,
    page_size=16,
    kv_pages=64,
    dtype="float32",
    device="cpu",
    architecture="FakeForCausalLM",
    num_parameters=1234,
    weight_bytes=5678,
    load_seconds=0.5,
)
TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }}{{ t.function.parameters | tojson }}{% endfor %}"
    "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


@functools.cache  # a process renders its template, which takes longer to start than most tests take
def toy_text(*, adds_bos: bool = True, chat: bool = True) -> TextModel:
    """The text side: one token per byte, a chat format with control tokens, and calls of tools as text."""
    controls = {"<s>": BOS, "</s>": EOS, "<|end|>": END}
    tokenizer = BpeTokenizer(
        tokens={value: bytes([value]) for value in range(256)},
        order=range(256),
        controls=controls,
        pattern=r"(?s).",
        bos_id=BOS if adds_bos else None,
        eos_id=EOS,
    )
    template = TemplateChat(TEMPLATE, controls=controls, encode=tokenizer.encode, variables={})
    return TextModel(tokenizer, template if chat else None, stop_ids=(END,), tools=HermesTools({}))


class FakeEngine:
    """See `engine.face.Engine`.

    Args:
        output: ids that every request is answered with; a request that wants more gets them again from the start.

    Attributes:
        gate: each token waits for it, if there is one.
        per_event: how many tokens come in one event, as where drafts were right or the reader was slow.
        fails_after: requests end with FinishReason.ERROR after so many tokens.
        requests, produced, cancelled, ended: what happened, for tests to look at.
        lora_errors: raised when the adapter of a name is loaded.
        lora_paths: where each loaded adapter was read from.
    """

    def __init__(self, output: Sequence[int] = b"abc", info: EngineInfo = INFO) -> None:
        self.info = info
        self.output = list(output)
        self.gate: Gate | None = None
        self.per_event = 1
        self.fails_after: int | None = None
        self.heartbeat_age = 0.0
        self.stats = EngineStats(max_batch_size=info.max_batch_size, kv_pages_total=info.kv_pages)
        self.failure: str | None = None
        self.closed = False
        self.killed: str | None = None
        self.requests: list[Request] = []
        self.produced = 0
        self.cancelled: list[str] = []
        self.ended: list[str] = []
        self.lora_errors: dict[str, EngineError] = {}
        self.lora_paths: dict[str, str] = {}
        self.vocabulary: Vocabulary | None = None
        self._died = asyncio.Event()
        self._changed = asyncio.Condition()

    async def until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        """Wait until `condition` holds; it is looked at whenever a request begins, gets a token or ends."""
        async with asyncio.timeout(seconds), self._changed:
            await self._changed.wait_for(condition)

    def die(self, reason: str = "killed by signal 9") -> None:
        self.failure = self.failure or reason
        self._died.set()

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    async def close(self) -> None:
        self.closed = True
        self.die("the engine was closed")

    async def kill(self, reason: str) -> None:
        self.killed = reason
        self.die(reason)
        await self.close()

    async def generate(self, request: Request, ended: Callable[[], None] = lambda: None) -> AsyncGenerator[TokenEvent]:
        if self.failure is not None:
            raise EngineDeadError(self.failure)
        validate_request(request, self.info)
        if request.adapter is not None and request.adapter not in self.lora_paths:
            raise AdapterNotFoundError(request.adapter, self.lora_paths)
        self.requests.append(request)
        await self._notify()
        last = False
        try:
            waiting: TokenEvent | None = None
            async for event in self._events(request):
                waiting = event if waiting is None else merge(waiting, event)
                last = event.finish_reason is not None
                if last:
                    ended()
                if last or len(waiting.token_ids) in (0, self.per_event):
                    yield waiting
                    waiting = None
        finally:
            (self.ended if last else self.cancelled).append(request.request_id)
            await asyncio.shield(self._notify())

    @property
    def adapters(self) -> tuple[AdapterInfo, ...]:
        return tuple(AdapterInfo(name=name, rank=4, nbytes=100) for name in sorted(self.lora_paths))

    async def load_adapter(self, name: str, path: str) -> AdapterInfo:
        await asyncio.sleep(0)
        if name in self.lora_errors:
            raise self.lora_errors[name]
        self.lora_paths[name] = path
        return AdapterInfo(name=name, rank=4, nbytes=100)

    def unload_adapter(self, name: str) -> None:
        if name not in self.lora_paths:
            raise AdapterNotFoundError(name, self.lora_paths)
        del self.lora_paths[name]

    async def _events(self, request: Request) -> AsyncGenerator[TokenEvent]:
        sampling, prompt = request.sampling, len(request.prompt_token_ids)
        most = min(sampling.max_tokens, self.info.max_model_len - prompt)
        for token in request.prompt_token_ids[1:-1] if sampling.prompt_logprobs is not None else ():
            yield TokenEvent(request_id=request.request_id, prompt_logprobs=_logprobs(token, sampling.prompt_logprobs))
        for count in range(most):
            await self._step()
            token = self.output[count % len(self.output)]
            timings = Timings(queued=0.25, first_token=0.5, finished=1.0 + count) if count in (0, most - 1) else None
            end: FinishReason | None = None
            if token in sampling.stop_token_ids or self.fails_after == count:
                end = FinishReason.STOP if token in sampling.stop_token_ids else FinishReason.ERROR
                yield TokenEvent(
                    request_id=request.request_id,
                    finish_reason=end,
                    stop_token_id=token if end is FinishReason.STOP else None,
                    error=None if end is FinishReason.STOP else "the logits are not numbers",
                    prompt_tokens=prompt,
                    timings=timings,
                )
                return
            self.produced += 1
            await self._notify()
            yield TokenEvent(
                request_id=request.request_id,
                token_ids=[token],
                logprobs=_logprobs(token, sampling.logprobs),
                prompt_logprobs=_logprobs(request.prompt_token_ids[-1], None if count else sampling.prompt_logprobs),
                finish_reason=FinishReason.LENGTH if count == most - 1 else None,
                prompt_tokens=prompt,
                cached_tokens=1,
                timings=timings,
            )

    async def _step(self) -> None:
        """Wait for the gate, or for the engine's death.

        Raises:
            EngineDeadError: it came first.
        """
        if self.gate is not None:
            gate, death = asyncio.ensure_future(self.gate.pass_one()), asyncio.ensure_future(self._died.wait())
            try:
                await asyncio.wait({gate, death}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                gate.cancel()
                death.cancel()
        if self.failure is not None:
            raise EngineDeadError(self.failure)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _logprobs(token: int, count: int | None) -> list[TokenLogprob] | None:
    """Token t has logprob -t / 100 and rank 1 or, if odd, 2; beside it in `top` the next id at one less. None if none
    are asked for."""
    if count is None:
        return None
    top = [(token, -token / 100), (token + 1, -token / 100 - 1)][:count]
    return [TokenLogprob(token, -token / 100, 1 + token % 2, top)]
