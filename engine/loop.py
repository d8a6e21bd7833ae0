"""The core's loop, the same in a thread of this process (`engine.local`) and in a process of its own (`engine.worker`).

While there is work it steps and only glances at the inbox; when idle it waits for the inbox and beats once a second.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from engine.core import EngineCore
from engine.errors import InvalidRequestError
from engine.request import EngineStats, FinishReason, Request, TokenEvent

HEARTBEAT_SECONDS = 1.0


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Queue this request. Its id was never used before with this core."""

    request: Request


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """End this request, if it has not ended."""

    request_id: str


class StepOutput(msgspec.Struct, frozen=True, tag=True):
    """What one step did; without events it is a heart beat."""

    events: list[TokenEvent]
    stats: EngineStats


Command = Submit | Cancel
Receive = Callable[[float], list[Command] | None]
"""Commands that have arrived, waiting at most so many seconds for the first; None when there will be no more."""


def run_core(core: EngineCore, receive: Receive, emit: Callable[[StepOutput], None]) -> None:
    """Serve commands until `receive` says that there will be no more. What the runner raises passes through."""
    while True:
        commands = receive(0.0 if core.has_work else HEARTBEAT_SECONDS)
        if commands is None:
            return
        events = [event for command in commands if (event := _obey(core, command)) is not None]
        if core.has_work:
            events += core.step()
        emit(StepOutput(events, core.stats()))


def _obey(core: EngineCore, command: Command) -> TokenEvent | None:
    match command:
        case Submit(request):
            try:
                core.add(request)
            except InvalidRequestError as error:  # callers validate first; answered all the same
                return TokenEvent(request_id=request.request_id, finish_reason=FinishReason.ERROR, error=str(error))
            return None
        case Cancel(request_id):
            return core.cancel(request_id)
