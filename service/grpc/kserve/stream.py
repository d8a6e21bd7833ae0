"""One ModelStreamInfer RPC: requests run side by side, their responses interleave, all end together.

    client ─► reader ─┬─ request "a" ─┐
                      ├─ request "b" ─┼─► one at a time ─► client
                      └─ request "c" ─┘

- Each request writes its own responses, and has one at most that waits to be written. So a message costs no queue and
  no change of tasks, and a client that does not read pauses the requests of this stream and no others.
- An error of one request is a message of the stream; with `strict` it ends the stream and the other requests.
- Half-close lets everything end; cancellation and deadline end every request at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

from tritonclient.grpc import service_pb2 as pb

from service.errors import ServiceError
from service.grpc.kserve.responses import FINAL
from service.grpc.status import Context

MAX_REQUESTS = 1024  # in flight on one stream; then the reader waits, and HTTP/2 flow control makes the client wait


class Stream:
    """Runs once.

    Args:
        respond: all responses to one request; each has been written before the next one is asked for.
        strict: the first error ends the stream with its status.
    """

    def __init__(
        self,
        context: Context,
        respond: Callable[[pb.ModelInferRequest], AsyncGenerator[pb.ModelStreamInferResponse]],
        *,
        strict: bool,
    ) -> None:
        self._context = context
        self._respond = respond
        self._strict = strict
        self._writing = asyncio.Lock()  # gRPC takes one message at a time
        self._slots = asyncio.Semaphore(MAX_REQUESTS)

    async def run(self, requests: AsyncIterator[pb.ModelInferRequest]) -> None:
        """Serve until the client has closed its side and every request has ended.

        Raises:
            ServiceError: the first error, if strict.
        """
        try:
            async with asyncio.TaskGroup() as group:
                async for request in requests:
                    await self._slots.acquire()
                    group.create_task(self._answer(request))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _answer(self, request: pb.ModelInferRequest) -> None:
        try:
            async with aclosing(self._respond(request)) as responses:
                async for response in responses:
                    await self._write(response)
        except ServiceError as error:
            if self._strict:
                raise
            await self._write(_error(request, error))
        finally:
            self._slots.release()

    async def _write(self, message: pb.ModelStreamInferResponse) -> None:
        async with self._writing:
            await self._context.write(message)


def _error(request: pb.ModelInferRequest, error: ServiceError) -> pb.ModelStreamInferResponse:
    """The error with the id of its request, for clients that look; it is the request's last message."""
    message = pb.ModelStreamInferResponse(error_message=error.message)
    message.infer_response.id = request.id
    message.infer_response.model_name = request.model_name
    message.infer_response.parameters[FINAL].bool_param = True
    return message
