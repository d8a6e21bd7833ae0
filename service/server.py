"""A server's life: open the port, load, serve, drain, stop. Returns the exit code that says how it went.

port open, loading ──► ready ──SIGTERM──► draining ──accepted requests done, or drain_timeout──► 0
     │ model cannot be loaded: 1     │ engine lost: 70        │ second signal: at once
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import Done, Engine, EngineConfig, EngineError, LoadProgress
from engine.remote import RemoteEngine
from service.grpc.kserve import VIEW_NAMES
from service.grpc.server import GrpcServer
from service.lora import LoraFolder
from service.progress import load_progress
from service.security.access import EVERYBODY, Access
from service.security.limits import MAX_REQUEST_BYTES
from service.security.tls import Tls
from service.served import ServedModel
from service.telemetry.telemetry import Telemetry
from service.text.load import load_text
from service.text.tokenizer import TextModel

if TYPE_CHECKING:
    from service.telemetry.export import Export

log = logging.getLogger(__name__)

EXIT_DRAINED, EXIT_CONFIGURATION, EXIT_ENGINE_LOST = 0, 1, 70
ENGINE_CHECK_SECONDS = 0.2
LAST_WORDS_SECONDS = 1.0  # for the last messages to reach their clients


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What a server is started with.

    Attributes:
        grpc_address: HOST:PORT, port 0 for any free one.
        lora_dir: folder of LoRA adapters, None = none are served.
        lora_refresh: seconds between looks into it, 0 = only at the start.
        access: who may call what.
        tls: certificates of the ports, None = plain text.
        max_request_bytes: of one request, on any port.
        drain_timeout: seconds that accepted requests have to end after SIGTERM.
        progress_bar: somebody watches stderr: show a bar while loading, instead of log lines.
        metrics_aliases: metrics also under the names of others.
        otlp_endpoint: URL of the collector that gets traces, None = nothing is traced.
        trace_content: prompts and answers are part of traces.
    """

    engine: EngineConfig
    model_name: str
    model_aliases: tuple[str, ...] = ()
    grpc_address: str = "127.0.0.1:8001"
    lora_dir: Path | None = None
    lora_refresh: float = 0.0
    access: Access = EVERYBODY
    tls: Tls | None = None
    max_request_bytes: int = MAX_REQUEST_BYTES
    drain_timeout: float = 30.0
    progress_bar: bool = False
    metrics_aliases: bool = True
    otlp_endpoint: str | None = None
    trace_content: bool = False


StartEngine = Callable[[EngineConfig, LoadProgress], Coroutine[Any, Any, Engine]]
ReadyCallback = Callable[[str], Awaitable[None]]
"""Awaited once when the model is ready, with the address that the port is bound to."""


class Server:
    """One run of one server, in the running event loop.

    Args:
        start_engine: makes the engine; `engine.local.LocalEngine.start` serves programs that embed a server.
        load_text: reads the text side; runs in a thread.
    """

    def __init__(
        self,
        config: ServerConfig,
        start_engine: StartEngine = RemoteEngine.start,
        load_text: Callable[[Path], TextModel] = load_text,
    ) -> None:
        self._config = config
        self._start_engine = start_engine
        self._load_text = load_text
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        taken = (config.model_name, *config.model_aliases, *VIEW_NAMES)
        self._loras = None if config.lora_dir is None else LoraFolder(config.lora_dir, taken)
        self.model = ServedModel(config.model_name, config.model_aliases, self._loras)
        self._export = None if config.otlp_endpoint is None else _export_to(config.otlp_endpoint, config.trace_content)
        tracing = None if self._export is None else self._export.tracing
        self.telemetry = Telemetry(self.model, aliases=config.metrics_aliases, tracing=tracing)
        self.model.observer = self.telemetry.requests

    def stop(self) -> None:
        """What SIGTERM and SIGINT do: the first call drains, the second ends the draining."""
        (self._hurry if self._stop.is_set() else self._stop).set()

    async def run(self, on_ready: ReadyCallback | None = None) -> int:
        """Serve until `stop` is called or the engine is lost.

        Raises:
            CheckpointError, EngineConfigError: the model cannot be loaded.
            OSError: the port cannot be opened.
        """
        loop, signals = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self.stop)
        files = (self._config.access.keys, self._config.tls)
        watching = [asyncio.create_task(each.watch(), name="watch-files") for each in files if each is not None]
        try:
            return await self._run(on_ready)
        finally:
            for task in watching:
                task.cancel()
            for number in signals:
                loop.remove_signal_handler(number)
            if self._export is not None:
                await asyncio.to_thread(self._export.close)

    async def _run(self, on_ready: ReadyCallback | None) -> int:
        config = self._config
        grpc_server = GrpcServer(
            self.model,
            access=config.access,
            tls=config.tls,
            max_request_bytes=config.max_request_bytes,
            telemetry=self.telemetry,
        )
        host = self._config.grpc_address.rpartition(":")[0]
        address = f"{host}:{await grpc_server.start(self._config.grpc_address)}"
        log.info("listening", extra={"address": address})
        try:
            engine = await self._unless_stopped(self._load())
            if engine is None:
                return EXIT_DRAINED
            try:
                return await self._serve(engine, grpc_server, address, on_ready)
            finally:
                await engine.close()
        except EngineError as error:
            self.model.failed(str(error))
            raise
        finally:
            await grpc_server.stop(0)

    async def _load(self) -> Engine:
        """Text side and engine at the same time; both or neither."""
        with load_progress(self._config.model_name, bar=self._config.progress_bar) as show:

            def progress(phase: str, done: Done) -> None:
                self.model.loading(phase, done)
                show(phase, done)

            return await self._load_both(progress)

    async def _load_both(self, progress: LoadProgress) -> Engine:
        path = Path(self._config.engine.model_path)
        starting = asyncio.create_task(self._start_engine(self._config.engine, progress))
        reading = asyncio.create_task(asyncio.to_thread(self._load_text, path))
        try:
            engine, text = await asyncio.gather(starting, reading)
            if self._loras is not None:
                await self._loras.open(engine, self.model.loading)
            self.model.ready(engine, text)
        except BaseException:  # of the first to fail; minutes of loading weights are not waited for
            starting.cancel()
            reading.cancel()
            [half, _] = await asyncio.gather(starting, reading, return_exceptions=True)
            if not isinstance(half, BaseException):
                await half.close()
            raise
        return engine

    async def _unless_stopped(self, work: Awaitable[Engine]) -> Engine | None:
        """The result of `work`, or None, and `work` undone, if the server is told to stop first."""
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            log.info("stopped while loading")
            return None
        finally:
            stop.cancel()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _serve(
        self, engine: Engine, grpc_server: GrpcServer, address: str, on_ready: ReadyCallback | None
    ) -> int:
        log.info("ready", extra={"address": address, "model": self.model.model_name})
        greeting = asyncio.ensure_future(_greet(on_ready, address)) if on_ready else None
        watching = None
        if self._loras is not None and self._config.lora_refresh:
            watching = asyncio.create_task(self._loras.watch(self._config.lora_refresh), name="lora-refresh")
        try:
            while not self._stop.is_set():
                if engine.failure is not None:
                    log.error("engine lost", extra={"reason": engine.failure})
                    self.model.failed(engine.failure)
                    await grpc_server.stop(LAST_WORDS_SECONDS)
                    return EXIT_ENGINE_LOST
                if greeting is not None and greeting.done():
                    greeting.result()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), ENGINE_CHECK_SECONDS)
            return await self._drain(engine, grpc_server)
        finally:
            for task in (greeting, watching):
                if task is not None and not task.done():
                    task.cancel()

    async def _drain(self, engine: Engine, grpc_server: GrpcServer) -> int:
        """Accepted requests end, or are cancelled at the limit; nothing is accepted any more."""
        log.info("draining", extra={"in_flight": self.model.in_flight, "timeout": self._config.drain_timeout})
        self.model.draining()
        # Not the port's own grace period: an open Watch or an idle stream would last until its limit.
        idle, hurry = asyncio.ensure_future(self.model.idle.wait()), asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait({idle, hurry}, timeout=self._config.drain_timeout, return_when=asyncio.FIRST_COMPLETED)
        lost = self.model.in_flight
        await grpc_server.stop(LAST_WORDS_SECONDS if idle.done() else 0)
        idle.cancel()
        hurry.cancel()
        log.info("stopped", extra={"lost": lost})
        return EXIT_DRAINED if engine.failure is None else EXIT_ENGINE_LOST


async def _greet(on_ready: ReadyCallback, address: str) -> None:
    """A terminal that has gone away must not take the server with it."""
    try:
        await on_ready(address)
    except OSError as error:
        log.warning("nobody reads the greeting", extra={"reason": error.strerror})


def _export_to(endpoint: str, content: bool) -> Export:
    """Imports what it needs: a server without traces starts without it."""
    from service.telemetry.export import Export

    log.info("traces", extra={"endpoint": endpoint, "content": content})
    return Export.to_collector(endpoint, content=content)
