"""Conversations in a terminal: with a server over the typed API, or with an engine of our own. Answers stream."""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Protocol, TextIO

import grpc
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc

from engine import EngineConfig, FinishReason, LoadProgress, SamplingParams
from engine.remote import RemoteEngine
from service.cli.connection import channel_to, metadata_with
from service.errors import ServiceError, TalkError
from service.generation import Delta, Finished, GenerationRequest, Generator
from service.text.chat import Conversation, Message
from service.text.load import load_text

HELP = "/reset forgets the conversation, /exit ends it; Ctrl-C stops an answer"


class Partner(Protocol):
    """Who answers."""

    def answer(self, messages: list[Message]) -> AsyncGenerator[str]:
        """Pieces of the answer. Closing the iterator stops it. Raises TalkError."""

    async def close(self) -> None: ...


class RemotePartner:
    """A server at HOST:PORT.

    Args:
        model: empty = whatever the server serves.
        api_key: of ours, if it asks for one.
        tls_ca: PEM file of the CA that vouches for its certificate; None = it does not encrypt.

    Raises:
        OSError: the file cannot be read.
    """

    def __init__(
        self,
        address: str,
        model: str,
        max_tokens: int | None,
        temperature: float,
        *,
        api_key: str | None = None,
        tls_ca: Path | None = None,
    ) -> None:
        self._address = address
        self._model = model
        self._encrypts = tls_ca is not None
        self._channel = channel_to(address, tls_ca)
        self._metadata = metadata_with(api_key)
        self._service = rpc.GenerationServiceStub(self._channel)
        self._sampling = pb.SamplingParameters(max_tokens=max_tokens, temperature=temperature)

    async def answer(self, messages: list[Message]) -> AsyncGenerator[str]:
        chat = pb.Chat(messages=[pb.ChatMessage(role=each.role, content=each.content) for each in messages])
        request = pb.GenerateRequest(model=self._model, chat=chat, sampling=self._sampling)
        call = self._service.Generate(request, metadata=self._metadata)
        try:
            async for response in call:
                if response.delta.text:
                    yield response.delta.text
                if response.finished.reason == pb.FINISH_REASON_ERROR:
                    raise TalkError(response.finished.error)
        except grpc.aio.AioRpcError as error:
            said = f"{error.code().name}: {error.details()}"
            raise TalkError(f"{self._address}: {said}{self._hint(said)}") from None
        finally:
            call.cancel()

    def _hint(self, said: str) -> str:
        """What the person may have forgotten."""
        if said.startswith("UNAUTHENTICATED") and not self._metadata:
            return "; give yours with --api-key or NEMOSERVE_API_KEY"
        if "Socket closed" in said and not self._encrypts:  # as TLS meets what is no handshake
            return "; if the server has a certificate, give --tls-ca"
        return ""

    async def close(self) -> None:
        await self._channel.close()


class LocalPartner:
    """An engine that this program started for itself."""

    def __init__(self, engine: RemoteEngine, generator: Generator, max_tokens: int | None, temperature: float) -> None:
        self._engine = engine
        self._generator = generator
        self._until_context = max_tokens is None
        self._sampling = SamplingParams(max_tokens=max_tokens or 1, temperature=temperature)

    @classmethod
    async def start(
        cls, path: Path, max_tokens: int | None, temperature: float, progress: LoadProgress = lambda phase, done: None
    ) -> LocalPartner:
        """Raises EngineError: the model cannot be loaded."""
        text = await asyncio.to_thread(load_text, path)
        engine = await RemoteEngine.start(EngineConfig(model_path=str(path)), progress)
        return cls(engine, Generator(engine, text), max_tokens, temperature)

    async def answer(self, messages: list[Message]) -> AsyncGenerator[str]:
        request = GenerationRequest(
            request_id=secrets.token_hex(8),  # the one that was stopped may not be gone yet
            prompt=Conversation(messages=tuple(messages)),
            sampling=self._sampling,
            until_context=self._until_context,
        )
        try:
            async with aclosing(self._generator.generate(request)) as events:
                async for event in events:
                    if isinstance(event, Delta):
                        yield event.text
                    elif isinstance(event, Finished) and event.reason is FinishReason.ERROR:
                        raise TalkError(event.error or "the engine failed")
        except ServiceError as error:
            raise TalkError(error.message) from None

    async def close(self) -> None:
        await self._engine.close()


async def say(partner: Partner, messages: list[Message], out: TextIO) -> str:
    """Stream one answer to `out`; returns it."""
    pieces = []
    async with aclosing(partner.answer(messages)) as answer:
        async for piece in answer:
            pieces.append(piece)
            out.write(piece)
            out.flush()
    out.write("\n")
    out.flush()
    return "".join(pieces)


def converse(runner: asyncio.Runner, partner: Partner, read: Callable[[], str], out: TextIO = sys.stdout) -> None:
    """Read and answer until the reader ends. The event loop runs during answers only."""
    out.write(HELP + "\n")
    messages: list[Message] = []
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            out.write("\n")
            return
        match line:
            case "":
                continue
            case "/exit" | "/quit":
                return
            case "/reset":
                messages = []
                continue
            case _ if line.startswith("/"):
                out.write(HELP + "\n")
                continue
        messages.append(Message(role="user", content=line))
        try:
            messages.append(Message(role="assistant", content=runner.run(say(partner, messages, out))))
        except KeyboardInterrupt:
            out.write("\n")
            messages.pop()
        except TalkError as error:
            out.write(f"\n{error}\n")
            messages.pop()
