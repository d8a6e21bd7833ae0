"""How a server is asked for tokens: over the typed API, or over OpenAI's completions, which many servers speak."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import grpc
import httpx
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc

from service.cli.connection import channel_to, metadata_with
from service.errors import TalkError

SECONDS = 600.0  # of one request; a long answer of a large model on a CPU takes minutes


@dataclass(slots=True)
class Answer:
    """What came of one request. Times are seconds on the monotonic clock.

    Attributes:
        arrivals: of each message with text.
        prompt_tokens, new_tokens: as the server counts them; without its count, a message is a token.
        error: why it did not end well; None: it did.
    """

    submitted: float
    arrivals: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    new_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request."""

    prompt: str
    new_tokens: int
    ignore_eos: bool = True
    temperature: float = 0.0


class Client(Protocol):
    """One server, and one of its models."""

    @property
    def name(self) -> str:
        """Where it is, for people."""

    async def ask(self, ask: Ask) -> Answer:
        """The whole answer; errors are in it."""

    async def close(self) -> None: ...


class TypedClient:
    """`nemoserve.v1.GenerationService` at HOST:PORT.

    Raises:
        OSError: the CA's file cannot be read.
    """

    def __init__(self, address: str, model: str, api_key: str | None, tls_ca: Path | None) -> None:
        self.name = address
        self._model = model
        self._channel = channel_to(address, tls_ca)
        self._metadata = metadata_with(api_key)
        self._service = rpc.GenerationServiceStub(self._channel)

    async def ask(self, ask: Ask) -> Answer:
        sampling = pb.SamplingParameters(
            max_tokens=ask.new_tokens, temperature=ask.temperature, ignore_eos=ask.ignore_eos
        )
        request = pb.GenerateRequest(model=self._model, prompt=ask.prompt, sampling=sampling)
        answer = Answer(time.monotonic())
        try:
            async for response in self._service.Generate(request, metadata=self._metadata, timeout=SECONDS):
                if response.HasField("delta") and response.delta.text:
                    answer.arrivals.append(time.monotonic())
                elif response.HasField("finished"):
                    answer.prompt_tokens = response.finished.usage.prompt_tokens
                    answer.new_tokens = response.finished.usage.completion_tokens
                    answer.error = response.finished.error or None
        except grpc.aio.AioRpcError as error:
            answer.error = f"{error.code().name}: {error.details()}"
        return answer

    async def close(self) -> None:
        await self._channel.close()


class OpenAIClient:
    """`POST /v1/completions` of any server.

    Args:
        url: up to `/v1`, with or without it.
        connections: at once.
    """

    def __init__(self, url: str, model: str, api_key: str | None, tls_ca: Path | None, connections: int) -> None:
        self.name = url.rstrip("/").removesuffix("/v1")
        self._model = model
        self._http = httpx.AsyncClient(
            base_url=self.name,
            headers={} if api_key is None else {"authorization": f"Bearer {api_key}"},
            verify=True if tls_ca is None else str(tls_ca),
            timeout=httpx.Timeout(SECONDS),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            trust_env=False,
        )

    async def find_model(self) -> None:
        """Ask for the first that is served, unless one was named.

        Raises:
            TalkError: there is no such server.
        """
        if self._model:
            return
        try:
            response = await self._http.get("/v1/models")
            response.raise_for_status()
            self._model = response.json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise TalkError(f"{self.name}/v1/models: {_said(error)}; name the model with --model") from None

    async def ask(self, ask: Ask) -> Answer:
        body = {
            "model": self._model,
            "prompt": ask.prompt,
            "max_tokens": ask.new_tokens,
            "temperature": ask.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if ask.ignore_eos:  # which OpenAI itself does not know
            body["ignore_eos"] = True
        answer = Answer(time.monotonic())
        try:
            async for event in self._events(body):
                if "error" in event:
                    answer.error = str(event["error"].get("message", event["error"]))
                if any(choice.get("text") for choice in event.get("choices") or ()):
                    answer.arrivals.append(time.monotonic())
                if usage := event.get("usage"):
                    answer.prompt_tokens, answer.new_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        except (httpx.HTTPError, ValueError, LookupError, AttributeError, TypeError) as error:
            answer.error = _said(error)
        answer.new_tokens = answer.new_tokens or len(answer.arrivals)
        return answer

    async def _events(self, body: dict[str, object]) -> AsyncGenerator[dict[str, Any]]:
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                await response.aread()
                response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line[6:])

    async def close(self) -> None:
        await self._http.aclose()


def _said(error: Exception) -> str:
    """In one line."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"status {error.response.status_code}: {error.response.text[:200]}"
    return f"{type(error).__name__}: {error}".rstrip(": ")
