"""Keeps an engine behind the served model: starts it, watches its heart, starts it again, and exchanges the model.

             ┌────────── loaded ◄──────── load again, after a pause ◄──┐
loading ─────┴──► ready ── dead, or no heart beat for too long: killed ┤
   │ what is wrong the first time is raised                            └─ too often: lost for good
   │
ready ── unload: what runs ends, engine closed ──► unloaded ── load ──► loading
ready ── load: what runs ends, engine closed, the other one loaded, or the old one again if that fails ──► ready

One task does all of this, so that there is one engine at a time, and none that nobody owns.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from engine import Done, Engine, EngineConfig, EngineDeadError, EngineError
from service.caller import CALLER
from service.errors import Code, ServiceError
from service.host import Cause, Phase
from service.loading import Find, Loaded, Loader
from service.models.errors import StoreError
from service.progress import load_progress
from service.served import ServedModel
from service.text.tokenizer import TextModel

log = logging.getLogger(__name__)

FAILURES = (EngineError, StoreError, OSError)  # of a load
CHECK_SECONDS = 0.2
SILENT_CHECKS = 3  # in a row: an event loop that was itself held up reads what has arrived before the next one
RESTART_WINDOW_SECONDS = 600.0
MAX_PAUSE_SECONDS = 30.0


class Trouble(NamedTuple):
    cause: Cause
    reason: str


@dataclass(slots=True)
class Wish:
    """A change that a client waits for. `config` None: unload."""

    config: EngineConfig | None
    granted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def given_up(self) -> bool:
        """Nobody waits for it any more, or it has been answered."""
        return self.granted.done()

    def grant(self) -> None:
        if not self.granted.done():
            self.granted.set_result(None)

    def refuse(self, code: Code, message: str) -> None:
        if not self.granted.done():
            self.granted.set_exception(ServiceError(code, message))


class Supervisor:
    """See the module. Belongs to one event loop.

    Args:
        restarts: how often in RESTART_WINDOW_SECONDS an engine is started again.
        find: what clients may load in the model's place; None: nothing.
        progress_bar: see `service.progress.load_progress`.
    """

    def __init__(
        self,
        model: ServedModel,
        loader: Loader,
        config: EngineConfig,
        *,
        restarts: int,
        find: Find | None = None,
        progress_bar: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._loader = loader
        self._config = config
        self._restarts = restarts
        self._find = find
        self._progress_bar = progress_bar
        self._clock = clock
        self._engine: Engine | None = None
        self._text: TextModel | None = None
        self._times: list[float] = []  # of restarts
        self._wishes: asyncio.Queue[Wish] = asyncio.Queue()

    @property
    def config(self) -> EngineConfig:
        """How the model that is served now is run."""
        return self._config

    async def run(self, on_ready: Callable[[], None] = lambda: None) -> str:
        """Returns why the engine is lost for good; ends before only by being cancelled, and closes the engine then.

        Args:
            on_ready: called when the model is ready for the first time.

        Raises:
            CheckpointError, EngineConfigError, StoreError, OSError: the model cannot be loaded, the first time.
        """
        try:
            try:
                self._serve(await self._load(self._config, "load", None))
            except EngineDeadError as error:
                if (lost := await self._restart(Trouble(Cause.NOT_STARTED, str(error)))) is not None:
                    return lost
            on_ready()
            while True:
                trouble = await self._watch()
                if trouble is not None and (lost := await self._restart(trouble)) is not None:
                    return lost
        finally:
            await self._close()

    # -- watching and starting again ---------------------------------------------------------------------------

    async def _watch(self) -> Trouble | None:
        """Until there is trouble, or a wish has been granted, or refused."""
        silent = 0
        while True:
            with suppress(TimeoutError):
                wish = await asyncio.wait_for(self._wishes.get(), CHECK_SECONDS)
                return await self._grant(wish)
            if self._engine is None:
                continue
            if self._engine.failure is not None:
                return Trouble(Cause.DIED, self._engine.failure)
            self._model.admission.look()
            silent = silent + 1 if self._model.silent else 0
            if silent == SILENT_CHECKS:
                return Trouble(Cause.HUNG, f"no heart beat for {self._engine.heartbeat_age:.0f} s")

    async def _restart(self, trouble: Trouble) -> str | None:
        """Start the engine again, as often as is allowed. Returns why it is lost for good, None if it runs."""
        while True:
            await self._end(trouble)
            now = self._clock()
            self._times = [each for each in self._times if now - each < RESTART_WINDOW_SECONDS]
            if len(self._times) >= self._restarts:
                return self._lost(trouble)
            pause = min(2.0 ** (len(self._times) - 1), MAX_PAUSE_SECONDS) if self._times else 0.0
            self._times.append(now)
            self._model.restarts[trouble.cause] += 1
            fields = {"cause": str(trouble.cause), "reason": trouble.reason, "pause": pause}
            log.error("engine lost, starting it again", extra=fields | {"restart": len(self._times)})
            await asyncio.sleep(pause)
            try:
                self._serve(await self._load(self._config, "restart", self._text))
                log.info("engine runs again", extra={"seconds": round(self._clock() - now, 1)})
                return None
            except Exception as error:  # also what may pass: memory that is not yet free
                trouble = _not_started(error)

    async def _end(self, trouble: Trouble) -> None:
        """Its requests learn of it at once; then there is no engine."""
        engine, self._engine = self._engine, None
        if trouble.cause is Cause.HUNG and engine is not None:
            self._model.hung()
            await engine.kill(f"the engine does not answer: {trouble.reason}")
            await asyncio.sleep(CHECK_SECONDS)  # so that whoever watches sees it
        elif engine is not None:
            self._model.begin("restart")
            await engine.close()

    def _lost(self, trouble: Trouble) -> str:
        tries = f"; started again {len(self._times)} times in 10 minutes" if self._times else ""
        reason = f"the engine is lost: {trouble.reason}{tries}"
        self._model.failed(reason)
        return reason

    # -- loading -----------------------------------------------------------------------------------------------

    async def _load(self, config: EngineConfig, phase: str, text: TextModel | None) -> Loaded:
        """Raises what `Loader.load` does; EngineDeadError also for a load that shows no sign of life."""
        self._model.begin(phase)
        with load_progress(self._model.model_name, bar=self._progress_bar) as show:

            def progress(phase: str, done: Done) -> None:
                self._model.loading(phase, done)
                show(phase, done)

            loading = asyncio.create_task(self._loader.load(config, progress, text))
            try:
                while not loading.done():
                    await asyncio.wait({loading}, timeout=CHECK_SECONDS)
                    if not self._model.alive:
                        raise EngineDeadError("the engine showed no sign of life while it loaded")
                return loading.result()
            except BaseException:  # also where the load has ended meanwhile: an engine that nobody owns would go on
                loading.cancel()
                [half] = await asyncio.gather(loading, return_exceptions=True)
                if isinstance(half, Loaded):
                    await half.engine.close()
                raise

    def _serve(self, loaded: Loaded) -> None:
        self._engine, self._text = loaded.engine, loaded.text
        self._model.ready(loaded.engine, loaded.text)

    async def _close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.close()

    # -- the model exchanged: `service.host.ModelControl` ------------------------------------------------------

    async def load(self, model: str | None) -> None:
        """See `service.host.ModelControl.load`."""
        config = self._config
        if model is not None:
            if self._find is None:
                raise ServiceError(Code.FAILED_PRECONDITION, "this server has no model store to load from")
            config = await asyncio.to_thread(self._find, model)
        await self._wish(Wish(config))

    async def unload(self) -> None:
        """See `service.host.ModelControl.unload`."""
        await self._wish(Wish(None))

    async def _grant(self, wish: Wish) -> Trouble | None:
        """Change the model as is wished, and tell how it went. Returns the trouble that this ended in, if it did."""
        if wish.given_up:
            return None
        if wish.config is not None:
            return await self._exchange(wish, wish.config)
        if self._engine is not None and await self._emptied(wish, takes=False):
            await self._close()
            self._text = None
            self._model.unloaded()
            log.info("model unloaded")
        wish.grant()
        return None

    async def _exchange(self, wish: Wish, config: EngineConfig) -> Trouble | None:
        try:  # what is broken is mostly found before anything is given up
            text = await self._loader.read_text(Path(config.model_path))
        except Exception as error:
            _refuse(wish, config, error)
            return None
        before = self._text
        if self._engine is not None and not await self._emptied(wish, takes=True):
            return None
        await self._close()
        try:
            self._serve(await self._load(config, "load", text))
        except Exception as error:
            _refuse(wish, config, error)
            return await self._return(before)
        self._config = config
        log.info("model loaded", extra={"path": config.model_path})
        wish.grant()
        return None

    async def _return(self, text: TextModel | None) -> Trouble | None:
        """To the model before, or to none if there was none."""
        if text is None:
            self._model.unloaded()
            return None
        try:
            self._serve(await self._load(self._config, "load the model before", text))
        except Exception as error:
            return _not_started(error)
        return None

    async def _emptied(self, wish: Wish, *, takes: bool) -> bool:
        """Wait until the engine has nothing to do, or is dead; no request begins meanwhile. False, and nothing has
        changed, if it hangs or nobody wishes this any more.

        Args:
            takes: new requests wait, else they are refused.
        """
        engine = self._engine
        assert engine is not None
        self._model.hold(takes=takes)
        while self._model.admission.running:
            if self._model.silent:
                wish.refuse(Code.UNAVAILABLE, "the engine does not answer; try again")
            if wish.given_up:
                assert self._text is not None
                self._model.ready(engine, self._text)
                return False
            with suppress(TimeoutError):
                await asyncio.wait_for(self._model.admission.settled(), CHECK_SECONDS)
        return True

    async def _wish(self, wish: Wish) -> None:
        if not CALLER.get().admin:
            raise ServiceError(Code.PERMISSION_DENIED, "loading and unloading the model takes an administrator's key")
        if self._model.status.phase is Phase.DRAINING:
            raise ServiceError(Code.UNAVAILABLE, "the server is shutting down")
        self._wishes.put_nowait(wish)
        try:
            await wish.granted
        finally:
            wish.granted.cancel()  # who has gone away wishes nothing any more


def _not_started(error: Exception) -> Trouble:
    """One that nobody foresaw is no reason to end a server that has served: it is tried again like the others."""
    if isinstance(error, FAILURES):
        return Trouble(Cause.NOT_STARTED, str(error))
    log.error("the load failed in an unforeseen way", exc_info=error)
    return Trouble(Cause.NOT_STARTED, f"{type(error).__name__}: {error}")


def _refuse(wish: Wish, config: EngineConfig, error: Exception) -> None:
    """The model cannot be loaded; whatever the reason, the server and the model before go on."""
    if isinstance(error, FAILURES):
        log.error("model not loaded", extra={"path": config.model_path, "reason": str(error)})
        shown = str(error).replace(f"{Path(config.model_path).parent}/", "")  # where the model store is is our business
        wish.refuse(Code.FAILED_PRECONDITION, shown)
    else:
        log.error("model not loaded", exc_info=error, extra={"path": config.model_path})
        wish.refuse(Code.INTERNAL, "internal error; the log has the rest")
