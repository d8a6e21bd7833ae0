"""The engine with its core in a thread of this process: for tests, benchmarks, and programs that embed it."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable

from engine.config import EngineConfig
from engine.core import EngineCore, StepRunner
from engine.errors import EngineError
from engine.face import LoadProgress
from engine.loop import Command, StepOutput, run_core
from engine.mailbox import MailboxEngine

log = logging.getLogger(__name__)


class LocalEngine(MailboxEngine):
    """See `engine.face.Engine`. Use `start`."""

    def __init__(self, core: EngineCore, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(core.info)
        self._core = core
        self._loop = loop
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine-core", daemon=True)
        self._thread.start()

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        progress: LoadProgress = lambda phase, done: None,
        load: Callable[[EngineConfig, LoadProgress], StepRunner] | None = None,
    ) -> LocalEngine:
        """Load a model and start its core.

        Args:
            load: makes the runner; None = `engine.parallel.leader.load_runner`.

        Raises:
            CheckpointError, EngineConfigError: the model cannot be loaded.
        """
        if load is None:
            from engine.parallel.leader import load_runner  # torch is imported by who needs it

            load = load_runner
        loop = asyncio.get_running_loop()
        runner = await loop.run_in_executor(None, load, config, progress)
        return cls(EngineCore(runner, config), loop)

    async def close(self) -> None:
        if self._thread.is_alive():
            self._inbox.put(None)
            await self._loop.run_in_executor(None, self._thread.join)
        self._die("the engine was closed")

    async def kill(self, reason: str) -> None:
        """See `engine.face.Engine.kill`. A thread cannot be ended: it ends by itself after its step, or never."""
        self._die(reason)
        self._inbox.put(None)

    def _send(self, command: Command) -> None:
        self._inbox.put(command)

    def _run(self) -> None:
        reason = "the engine was closed"
        try:
            run_core(self._core, self._receive, self._emit)
        except Exception as error:  # whatever the runner raised ends the engine, and every request learns of it
            log.exception("the engine failed")
            reason = str(error) if isinstance(error, EngineError) else f"the engine failed: {type(error).__name__}"
        self._in_loop(lambda: self._die(reason))

    def _receive(self, timeout: float) -> list[Command] | None:
        commands: list[Command] = []
        try:
            command = self._inbox.get(timeout=timeout) if timeout else self._inbox.get_nowait()
            while command is not None:
                commands.append(command)
                command = self._inbox.get_nowait()
        except queue.Empty:
            return commands
        return None

    def _emit(self, output: StepOutput) -> None:
        self._in_loop(lambda: self._deliver(output))

    def _in_loop(self, call: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            log.debug("the event loop is closed; nobody waits for what the engine says")
