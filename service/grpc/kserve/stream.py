"""One ModelStreamInfer RPC: requests run side by side, their responses interleave, all end together.

    client ─► reader ─┬─ request "a" ─┐
                      ├─ request "b" ─┼─► bounded queue ─► writer ─► client
                      └─ request "c" ─┘

- An error of one request is a message of the stream; with `strict` it ends the stream and the other requests.
- A client that does not read fills the queue, which pauses the requests of this stream and no others.
- Half-close lets everything end; cancellation and deadline end every request at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from tritonclient.grpc import service_pb2 as pb

from service.errors import ServiceError
from service.grpc.status import Context

QUEUE_MESSAGES = 16  # enough to keep the writer busy; what a stalled client costs in memory
MAX_REQUESTS = 1024  # in flight on one stream; then the reader waits, and HTTP/2 flow control makes the client wait


@dataclass(frozen=True, slots=True)
class End:
    """Nothing follows in the queue. `error` is what ended the stream early."""

    error: BaseException | None


class Stream:
    """Runs once.

    Args:
        respond: all responses to one request.
        strict: the first error ends the stream with its status.
    """

    def __init__(
        self,
        context: Context,
        respond: Callable[[pb.ModelInferRequest], AsyncGenerator[pb.ModelInferResponse]],
        *,
        strict: bool,
    ) -> None:
        self._context = context
        self._respond = respond
        self._strict = strict
        self._queue: asyncio.Queue[pb.ModelStreamInferResponse | End] = asyncio.Queue(QUEUE_MESSAGES)
        self._slots = asyncio.Semaphore(MAX_REQUESTS)

    async def run(self, requests: AsyncIterator[pb.ModelInferRequest]) -> None:
        """Serve until the client has closed its side and every request has ended.

        Raises:
            ServiceError: the first error, if strict.
        """
        reader = asyncio.create_task(self._read(requests))
        try:
            while not isinstance(message := await self._queue.get(), End):
                await self._context.write(message)
        finally:
            reader.cancel()
            await asyncio.wait([reader])
        if message.error is not None:
            raise message.error

    async def _read(self, requests: AsyncIterator[pb.ModelInferRequest]) -> None:
        error: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                async for request in requests:
                    await self._slots.acquire()
                    group.create_task(self._answer(request))
        except BaseExceptionGroup as failures:
            error = failures.exceptions[0]
        await self._queue.put(End(error))

    async def _answer(self, request: pb.ModelInferRequest) -> None:
        try:
            async with aclosing(self._respond(request)) as responses:
                async for response in responses:
                    await self._queue.put(pb.ModelStreamInferResponse(infer_response=response))
        except ServiceError as error:
            if self._strict:
                raise
            await self._queue.put(_error(request, error))
        finally:
            self._slots.release()


def _error(request: pb.ModelInferRequest, error: ServiceError) -> pb.ModelStreamInferResponse:
    """The error with the id of its request, for clients that look; it is the request's last message."""
    message = pb.ModelStreamInferResponse(error_message=error.message)
    message.infer_response.id = request.id
    message.infer_response.model_name = request.model_name
    message.infer_response.parameters["triton_final_response"].bool_param = True
    return message
