"""A server's life: open the ports, load, serve, drain, stop. Returns the exit code that says how it went.

ports open, loading ──► ready ──SIGTERM──► draining ─────────────────────► told to go away ──────────────► 0
      │ cannot be loaded: 1             not ready, new requests are     accepted requests end, or the
      │ engine lost for good: 70        taken for the lame-duck time    drain timeout; second signal: at once

The supervisor keeps the engine in all of these phases.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import EngineConfig, EngineError
from engine.remote import RemoteEngine
from service.admission import Admission, QueueLimits
from service.grpc.kserve import VIEW_NAMES
from service.host import Phase
from service.http.management import management_routes
from service.loading import Fetch, Find, Loader, LoadText, StartEngine
from service.lora import LoraFolder
from service.management import Package
from service.models.errors import StoreError
from service.ports import Ports
from service.security.access import EVERYBODY, Access
from service.security.limits import MAX_REQUEST_BYTES
from service.security.tls import Tls
from service.served import ServedModel
from service.supervisor import Supervisor
from service.telemetry.telemetry import Telemetry
from service.text.load import load_text

if TYPE_CHECKING:
    from service.telemetry.export import Export

log = logging.getLogger(__name__)

EXIT_DRAINED, EXIT_CONFIGURATION, EXIT_ENGINE_LOST = 0, 1, 70
LAST_WORDS_SECONDS = 1.0  # for the last messages to reach their clients
DRAIN_LOG_SECONDS = 5.0
CROSSING_SECONDS = 0.1  # for what was sent before its client was told to go away to arrive, and still be taken


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What a server is started with.

    Attributes:
        grpc_address: HOST:PORT, port 0 for any free one.
        http_address: the same; None = no HTTP.
        lora_dir: folder of LoRA adapters, None = none are served.
        lora_refresh: seconds between looks into it, 0 = only at the start.
        access: who may call what.
        tls: certificates of the ports, None = plain text.
        max_request_bytes: of one request, on any port.
        queue: how much may wait.
        lame_duck: seconds after SIGTERM in which new requests are still taken.
        drain_timeout: seconds after SIGTERM, the lame-duck time among them, that accepted requests have to end.
        max_connection_age: seconds after which clients are told to make a new connection, 0 = never.
        engine_restarts: how often in ten minutes the engine is started again.
        engine_timeout: seconds without a heart beat after which it counts as hung; None: see `service.served`.
        model_control: clients with the right to may load and unload the model.
        progress_bar: somebody watches stderr: show a bar while loading, instead of log lines.
        metrics_aliases: metrics also under the names of others.
        otlp_endpoint: URL of the collector that gets traces, None = nothing is traced.
        trace_content: prompts and answers are part of traces.
        repository_override: see `service.management.metadata`.
    """

    engine: EngineConfig
    model_name: str
    model_aliases: tuple[str, ...] = ()
    grpc_address: str = "127.0.0.1:8001"
    http_address: str | None = "127.0.0.1:8000"
    lora_dir: Path | None = None
    lora_refresh: float = 0.0
    access: Access = EVERYBODY
    tls: Tls | None = None
    max_request_bytes: int = MAX_REQUEST_BYTES
    queue: QueueLimits = field(default_factory=QueueLimits)
    lame_duck: float = 0.0
    drain_timeout: float = 25.0
    max_connection_age: float = 0.0
    engine_restarts: int = 3
    engine_timeout: float | None = None
    model_control: bool = False
    progress_bar: bool = False
    metrics_aliases: bool = True
    otlp_endpoint: str | None = None
    trace_content: bool = False
    repository_override: str = ""


ReadyCallback = Callable[[str], Awaitable[None]]
"""Awaited once when the model is ready, with the address that the gRPC port is bound to."""


class Server:
    """One run of one server, in the running event loop.

    Args:
        start_engine: makes the engine; `engine.local.LocalEngine.start` serves programs that embed a server.
        load_text: reads the text side; runs in a thread.
        fetch: brings the model's files, if they are not here yet; runs in a thread.
        find: what clients may load in the model's place.
        describe: what a model is, by how the engine was told to run it; without it there are no management routes.

    Attributes:
        ports: their addresses are the bound ones once the server runs.
    """

    def __init__(
        self,
        config: ServerConfig,
        start_engine: StartEngine = RemoteEngine.start,
        load_text: LoadText = load_text,
        fetch: Fetch | None = None,
        find: Find | None = None,
        describe: Callable[[EngineConfig], Package] | None = None,
    ) -> None:
        self._config = config
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._ready = asyncio.Event()
        taken = (config.model_name, *config.model_aliases, *VIEW_NAMES)
        self._loras = None if config.lora_dir is None else LoraFolder(config.lora_dir, taken)
        admission = Admission(config.queue, config.access.limits)
        self.model = ServedModel(config.model_name, config.model_aliases, self._loras, config.engine_timeout, admission)
        self._export = None if config.otlp_endpoint is None else _export_to(config.otlp_endpoint, config.trace_content)
        tracing = None if self._export is None else self._export.tracing
        self.telemetry = Telemetry(self.model, aliases=config.metrics_aliases, tracing=tracing)
        self.model.observer = self.telemetry.requests
        self._loader = Loader(start_engine, load_text, self._loras, fetch)
        self._supervisor = Supervisor(
            self.model,
            self._loader,
            config.engine,
            restarts=config.engine_restarts,
            find=find,
            progress_bar=config.progress_bar,
        )
        if config.model_control:
            self.model.control = self._supervisor
        self._describe = describe
        self.ports = Ports(
            self.model,
            config.grpc_address,
            config.http_address,
            routes=[] if describe is None else management_routes(self.model, self._package, config.repository_override),
            access=config.access,
            tls=config.tls,
            max_request_bytes=config.max_request_bytes,
            max_connection_age=config.max_connection_age,
            telemetry=self.telemetry,
        )

    def _facts(self) -> dict[str, Any]:
        """What was chosen, and what it gives."""
        info = self.model.info
        facts = {"kv_tokens": info.kv_pages * info.page_size, "max_model_len": info.max_model_len}
        return facts if self._describe is None else {"profile": self._package().profile(info), **facts}

    def _package(self) -> Package:
        """Of the model that is served now."""
        assert self._describe is not None
        return self._describe(self._supervisor.config)

    def abandoned(self, patience: float) -> bool:
        """See `service.loading.Loader.abandoned`."""
        return self._loader.abandoned(patience)

    def stop(self) -> None:
        """What SIGTERM and SIGINT do: the first call drains, the second ends the draining."""
        (self._hurry if self._stop.is_set() else self._stop).set()

    async def run(self, on_ready: ReadyCallback | None = None) -> int:
        """Serve until `stop` is called or the engine is lost for good.

        Raises:
            CheckpointError, EngineConfigError, StoreError: the model cannot be loaded.
            OSError: a port cannot be opened.
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
        ports = self.ports
        await ports.start()
        log.info("listening", extra={"address": ports.grpc_address, "http_address": ports.http_address})
        keeping = asyncio.create_task(self._supervisor.run(self._ready.set), name="supervisor")
        serving = asyncio.create_task(self._when_ready(ports.grpc_address, on_ready), name="when-ready")
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({keeping, stop}, return_when=asyncio.FIRST_COMPLETED)
            if stop.done():
                await self._drain(keeping)
            return await self._end(keeping)
        except (EngineError, StoreError, OSError) as error:
            self.model.failed(str(error))
            raise
        finally:
            for task in (keeping, serving, stop):
                task.cancel()
            await asyncio.gather(keeping, serving, stop, return_exceptions=True)
            await ports.stop(0)

    async def _when_ready(self, address: str, on_ready: ReadyCallback | None) -> None:
        """What begins with the first model and goes on until the end."""
        await self._ready.wait()
        facts = await asyncio.to_thread(self._facts)
        log.info("ready", extra={"address": address, "model": self.model.model_name, **facts})
        if on_ready is not None:
            await _greet(on_ready, address)
        if self._loras is not None and self._config.lora_refresh:
            await self._loras.watch(self._config.lora_refresh)

    async def _drain(self, keeping: asyncio.Task[str]) -> None:
        """Until every accepted request has ended, or the time for it has, or it is cut short."""
        began, timeout = time.monotonic(), self._config.drain_timeout
        served = self.model.status.phase is Phase.READY
        self.model.draining()
        hurry = asyncio.ensure_future(self._hurry.wait())
        try:
            if served and self._config.lame_duck:
                lame_duck = min(self._config.lame_duck, timeout)
                log.info("draining", extra={"in_flight": self.model.in_flight, "still_accepting": lame_duck})
                await asyncio.wait({hurry, keeping}, timeout=lame_duck, return_when=asyncio.FIRST_COMPLETED)
            self.ports.refuse()
            await asyncio.wait({hurry, keeping}, timeout=CROSSING_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            self.model.refuse()
            while self.model.in_flight and not (hurry.done() or keeping.done()):
                left = began + timeout - time.monotonic()
                if left <= 0:
                    break
                log.info("draining", extra={"in_flight": self.model.in_flight, "seconds_left": round(left, 1)})
                await self._idle(min(left, DRAIN_LOG_SECONDS), hurry, keeping)
        finally:
            hurry.cancel()

    async def _idle(self, seconds: float, *others: asyncio.Future[Any]) -> None:
        """Until no request is in flight, for so many seconds at most, or until one of the others is done."""
        idle = asyncio.ensure_future(self.model.idle.wait())
        try:
            await asyncio.wait({idle, *others}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            idle.cancel()

    async def _end(self, keeping: asyncio.Task[str]) -> int:
        """The engine ends, and requests that are left with it, in our own words; then the ports."""
        lost = self.model.in_flight
        reason = keeping.result() if keeping.done() else None
        self.model.cut_off()
        keeping.cancel()
        await self._idle(LAST_WORDS_SECONDS)
        await self.ports.stop(LAST_WORDS_SECONDS)  # also in a hurry: who has ended is not yet told so
        if reason is None:
            await asyncio.gather(keeping, return_exceptions=True)
            log.info("stopped", extra={"lost": lost})
            return EXIT_DRAINED
        log.error("stopped", extra={"reason": reason})
        return EXIT_ENGINE_LOST


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
