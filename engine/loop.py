"""The core's loop, the same in a thread of this process (`engine.local`) and in a process of its own (`engine.worker`).

While there is work it steps and only glances at the inbox; when idle it waits for the inbox, beats once a second, and
looks whether its books are in order: better no engine than one that mixes up the pages of its requests.
Adapters are read from their files beside it, one after the other, so that no step waits for a disk; grammars are
compiled beside it, so that no step waits for those.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
from msgspec.structs import replace

from engine.core import EngineCore, ReadAdapter
from engine.errors import AdapterNotFoundError, CheckpointError, EngineError, InvalidRequestError
from engine.request import AdapterInfo, EngineStats, FinishReason, Request, TokenEvent, Vocabulary

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
READING_SECONDS = 0.02  # an idle core looks so often for an adapter that has been read
COMPILING_SECONDS = 0.005  # and so often for a grammar, which somebody waits for


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Queue this request. Its id was never used before with this core."""

    request: Request


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """End this request, if it has not ended."""

    request_id: str


class LoadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Read the LoRA adapter in the folder `path`, and let requests find it under `name`. Answered with `call`."""

    call: int
    name: str
    path: str


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Requests that come from now on do not find the adapter that `call` loaded, unless another has its name already.
    Not answered."""

    call: int
    name: str


class SetVocabulary(msgspec.Struct, frozen=True, tag=True):
    """Grammars are about these tokens. Before any request with a grammar; the first counts. Not answered."""

    vocabulary: Vocabulary


class AdapterAnswer(msgspec.Struct, frozen=True):
    """How a LoadAdapter went: `info`, or the name of an error's type and its message."""

    call: int
    info: AdapterInfo | None = None
    kind: str = ""
    message: str = ""


class StepOutput(msgspec.Struct, frozen=True, tag=True):
    """What one step did; without events it is a heart beat."""

    events: list[TokenEvent]
    stats: EngineStats
    answers: list[AdapterAnswer] = []


Command = Submit | Cancel | LoadAdapter | UnloadAdapter | SetVocabulary
Receive = Callable[[float], list[Command] | None]
"""Commands that have arrived, waiting at most so many seconds for the first; None when there will be no more."""


def run_core(core: EngineCore, receive: Receive, emit: Callable[[StepOutput], None]) -> None:
    """Serve commands until `receive` says that there will be no more, and close the core. What the runner raises passes
    through."""
    reading = Reading(core)
    checked = False
    silent = 0.0  # seconds of waiting since something was said
    try:
        while True:
            silent += (patience := _patience(core, reading))
            commands = receive(patience)
            if commands is None:
                return
            events = [event for command in commands if (event := _obey(core, reading, command)) is not None]
            answers = reading.finished()
            events += core.admit_compiled()
            if works := core.has_work:
                events += core.step()
                checked = False
            elif not (commands or checked or core.is_compiling):
                core.check()
                checked = True
            if works or commands or events or answers or silent >= HEARTBEAT_SECONDS:
                emit(StepOutput(events, core.stats(), answers))
                silent = 0.0
    finally:
        reading.close()
        core.close()


def _patience(core: EngineCore, reading: Reading) -> float:
    """Seconds that nothing is lost by waiting for a command."""
    if core.has_work:
        return 0.0
    if core.is_compiling:
        return COMPILING_SECONDS
    return READING_SECONDS if reading else HEARTBEAT_SECONDS


def _obey(core: EngineCore, reading: Reading, command: Command) -> TokenEvent | None:
    match command:
        case Submit(request):
            try:
                core.add(request)
            except (InvalidRequestError, AdapterNotFoundError) as error:  # callers check what they can
                end = TokenEvent(request_id=request.request_id, finish_reason=FinishReason.ERROR, error=str(error))
                if isinstance(error, InvalidRequestError):
                    end = replace(end, error=error.reason, refused=error.field)
                return end
        case Cancel(request_id):
            return core.cancel(request_id)
        case LoadAdapter():
            reading.start(command)
        case UnloadAdapter():
            reading.unload(command)
        case SetVocabulary(vocabulary):
            core.set_vocabulary(vocabulary)
    return None


class Reading:
    """Adapters on their way from their files into the core, in the order in which they were asked for, and out of it.

    True while any are on their way in.
    """

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapters")
        self._begun: deque[tuple[LoadAdapter, Future[ReadAdapter]]] = deque()
        self._calls: dict[str, int] = {}  # name -> which loaded the adapter that has it

    def __bool__(self) -> bool:
        return bool(self._begun)

    def start(self, command: LoadAdapter) -> None:
        self._begun.append((command, self._thread.submit(self._core.read_adapter, command.name, command.path)))

    def finished(self) -> list[AdapterAnswer]:
        """Hand what has been read to the core, and say how it went."""
        answers = []
        while self._begun and self._begun[0][1].done():
            answers.append(self._finish(*self._begun.popleft()))
        return answers

    def unload(self, command: UnloadAdapter) -> None:
        """Nothing, where the adapter has lost its name to a later one, whose answer the caller did not know yet."""
        if self._calls.get(command.name) == command.call:
            del self._calls[command.name]
            self._core.remove_adapter(command.name)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _finish(self, command: LoadAdapter, read: Future[ReadAdapter]) -> AdapterAnswer:
        try:
            info = self._core.add_adapter(command.name, read.result())
            self._calls[command.name] = command.call
            return AdapterAnswer(command.call, info)
        except EngineError as error:
            return AdapterAnswer(command.call, kind=type(error).__name__, message=str(error))
        except Exception as error:  # of the reader, for example MemoryError: the engine goes on without this adapter
            log.exception("an adapter cannot be read")
            message = f"{command.path}: cannot be read: {type(error).__name__}"
            return AdapterAnswer(command.call, kind=CheckpointError.__name__, message=message)
