"""Log-likelihoods and completions over the typed API, as evaluation harnesses ask for them. Knows no harness, no torch.

    "Q: … A:" + " Paris"  ──split──►  context ids | continuation ids  ──Generate(prompt_logprobs)──►  sum, greedy or not

Where a continuation begins, what stands before an empty context and what is cut from a long one follow
lm-evaluation-harness (`lm_eval/api/model.py`, `models/huggingface.py`), since scores are only comparable with published
ones by the same rules. Ids come from the server's own tokenizer, so that a client needs none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc
from rich.console import Console
from rich.progress import track

A = TypeVar("A")
R = TypeVar("R")
Encode = Callable[[str], list[int]]

CALL_SECONDS = 600.0  # one request in a full batch on a slow CPU
MAX_NEW_TOKENS = 256  # where a task names none; the harness's default
RETRIES = {  # of calls that a loading or busy server refused; nothing was computed for them
    "maxAttempts": 5,
    "initialBackoff": "0.5s",
    "maxBackoff": "10s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
}
CHANNEL = [
    (
        "grpc.service_config",
        json.dumps(
            {"methodConfig": [{"name": [{"service": "nemoserve.v1.GenerationService"}], "retryPolicy": RETRIES}]}
        ),
    )
]


def split(encode: Encode, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of context and continuation. White space at the context's end goes to the continuation, where vocabularies
    have it; the continuation's ids are those that the whole text has more than the context.

    Args:
        encode: ids of a text that begins a sequence, with what the model wants before it.
    """
    kept = context.rstrip()
    ids, whole = encode(kept), encode(context + continuation)
    return ids, whole[len(ids) :]


def windows(ids: list[int], prefix: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """A long text in pieces that are scored one by one: context and continuation of each. Every token is in one
    continuation. A full piece has one token of context; the last one has as much as `length` allows.

    Args:
        prefix: stands before the first token.
        length: most tokens before a token that is scored.
    """
    for at in range(0, len(ids), length):
        end = min(at + length, len(ids))
        yield ids[max(0, end - length - 1) : at] if at else [prefix], ids[at:end]


class Scorer:
    """A served model. Several requests are under way at any time, so that the server can batch them.

    Args:
        address: HOST:PORT of the server.
        model: empty = the served model.
        concurrency: requests under way.
        max_length: most tokens before a token that is scored; longer contexts lose their beginning. None = as many as
            the server takes.
        prefix_token: stands before texts without context; None = the model's beginning of sequence.

    Raises:
        grpc.RpcError: the server does not answer, or does not have the model.
        ValueError: `max_length` is more than the server's context has room for.
    """

    def __init__(
        self,
        address: str,
        *,
        model: str = "",
        concurrency: int = 32,
        max_length: int | None = None,
        prefix_token: int | None = None,
    ) -> None:
        self._service = rpc.GenerationServiceStub(grpc.insecure_channel(address, options=CHANNEL))
        self._name = model
        self._concurrency = concurrency
        self.model = self._service.GetModel(pb.GetModelRequest(model=model), timeout=CALL_SECONDS).model
        # The scored token is part of the prompt, and the server wants room for one more.
        longest = self.model.max_model_len - 2
        if max_length is not None and not 1 <= max_length <= longest:
            raise ValueError(f"max_length: {max_length} must be between 1 and {longest}")
        self._length = max_length or longest
        self._prefix_token = prefix_token

    def loglikelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of each continuation after its context: sum of its tokens' log probabilities (natural), and whether greedy
        decoding would give it.

        Raises:
            ValueError: a continuation is longer than `max_length`, or nothing can stand before an empty context.
        """
        return self._map(lambda pair: self._score(*self._pair(*pair)), pairs, "continuations")

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Log-likelihood of each whole text, its first token after the prefix token."""

        def score(text: str) -> float:
            ids = self._encode(text, add_bos=False)
            return sum(self._score(*piece)[0] for piece in windows(ids, self._prefix(), self._length))

        return self._map(score, texts, "texts")

    def complete(self, asks: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Text after each prompt, without what ended it.

        Args:
            asks: prompt, and the harness's options: `until` (stop strings), `max_gen_toks`, `do_sample`, and names of
                SamplingParameters. Greedy unless `do_sample` or a temperature is given.

        Raises:
            ValueError: an option that is not known.
        """
        return self._map(lambda ask: self._complete(*ask), asks, "completions")

    def _map(self, do: Callable[[A], R], items: Sequence[A], what: str) -> list[R]:
        """`do` of every item, in order; the first error ends it."""
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            done = pool.map(do, items)
            return list(track(done, what, total=len(items), console=Console(stderr=True), transient=True))
        finally:
            pool.shutdown(cancel_futures=True)

    def _encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        request = pb.TokenizeRequest(model=self._name, text=text, add_special_tokens=add_bos)
        return list(self._service.Tokenize(request, timeout=CALL_SECONDS).token_ids)

    def _prefix(self) -> int:
        if self._prefix_token is not None:
            return self._prefix_token
        if not (begin := self._encode("")):
            raise ValueError("prefix_token: must be given for texts without context, since this model has no BOS")
        return begin[0]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context.strip():
            return split(self._encode, context, continuation)
        prefix, ids = self._prefix(), self._encode(context + continuation, add_bos=False)
        return [prefix], ids[1:] if ids[:1] == [prefix] else ids

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        if not continuation:
            return 0.0, True
        if len(continuation) > self._length:
            raise ValueError(f"continuation: {len(continuation)} tokens must be at most {self._length} (max_length)")
        ids = (context + continuation)[-self._length - 1 :]
        sampling = pb.SamplingParameters(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        events = self._generate(ids, sampling)
        scored = [entry for event in events for entry in event.prompt_logprobs.logprobs]
        if [entry.token_id for entry in scored] != ids[1:]:
            raise RuntimeError(f"the server sent logprobs of {len(scored)} tokens for a prompt of {len(ids)}")
        own = scored[-len(continuation) :]
        return sum(entry.logprob for entry in own), all(entry.rank == 1 for entry in own)

    def _complete(self, prompt: str, options: Mapping[str, Any]) -> str:
        sampling = sampling_of(options)
        room = self._length + 1 - sampling.max_tokens
        if room < 1:
            raise ValueError(f"max_gen_toks: {sampling.max_tokens} must be at most {self._length} (max_length)")
        return "".join(event.delta.text for event in self._generate(self._encode(prompt)[-room:], sampling))

    def _generate(self, ids: list[int], sampling: pb.SamplingParameters) -> list[pb.GenerateResponse]:
        request = pb.GenerateRequest(model=self._name, token_ids=pb.TokenIds(ids=ids), sampling=sampling)
        events = list(self._service.Generate(request, timeout=CALL_SECONDS))
        if (end := events[-1].finished).reason == pb.FINISH_REASON_ERROR:
            raise RuntimeError(f"the server could not generate: {end.error}")
        return events


def sampling_of(options: Mapping[str, Any]) -> pb.SamplingParameters:
    """The harness's options of a completion in terms of the typed API.

    Raises:
        ValueError: an option that is not known.
    """
    rest = dict(options)
    until = rest.pop("until", None) or []
    given = (rest.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"))
    tokens = next((int(value) for value in given if value is not None), MAX_NEW_TOKENS)
    temperature = float(rest.pop("temperature", None) or 0.0)
    if rest.pop("do_sample", temperature > 0.0) is False:
        temperature = 0.0
    try:
        return pb.SamplingParameters(
            max_tokens=tokens, temperature=temperature, stop=[until] if isinstance(until, str) else until, **rest
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"generation options {rest}: {error}") from None
