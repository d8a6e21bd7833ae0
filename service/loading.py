"""Puts a model together: fetched if it is not here, engine and text side at the same time, its LoRA adapters.

fetch ──► start engine ─┬─► load adapters ──► Loaded
     └──► read text ────┘                                 both or neither; undone when it is cancelled
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from msgspec.structs import replace

from engine import Done, Engine, EngineConfig, LoadProgress
from service.errors import Code, ServiceError, invalid
from service.models.download import Progress
from service.models.errors import StoreError
from service.models.store import ModelStore
from service.progress import DOWNLOAD
from service.text.tokenizer import TextModel

StartEngine = Callable[[EngineConfig, LoadProgress], Coroutine[Any, Any, Engine]]
LoadText = Callable[[Path], TextModel]
Fetch = Callable[[Progress], object]
"""Brings the model's files to where the engine looks for them; blocks."""

DOWNLOAD_SHARE = 0.9  # of the whole progress, if files are fetched: a network is slower than a disk

T = TypeVar("T")


Find = Callable[[str], EngineConfig]
"""How another model is run, by the name that a client gives. Raises ServiceError: INVALID_ARGUMENT, NOT_FOUND."""


class Adapters(Protocol):
    """What loads LoRA adapters into a new engine."""

    async def open(self, engine: Engine, progress: LoadProgress) -> None: ...


@dataclass(frozen=True, slots=True)
class Loaded:
    engine: Engine
    text: TextModel


class Loader:
    """See the module. Belongs to one event loop.

    A load that is given up leaves its thread behind, which nobody can end from outside. Files arrive under other names,
    so that it can be left anywhere; but a fetch holds the lock of the model store, and others wait for that. It ends,
    and gives the lock back, as soon as it has progress to tell.
    """

    def __init__(
        self, start_engine: StartEngine, load_text: LoadText, adapters: Adapters | None, fetch: Fetch | None = None
    ) -> None:
        self._start_engine = start_engine
        self._load_text = load_text
        self._adapters = adapters
        self._fetch = fetch
        self._abandoned: list[threading.Thread] = []

    async def load(self, config: EngineConfig, progress: LoadProgress, text: TextModel | None = None) -> Loaded:
        """Everything; what fails first undoes the rest.

        Args:
            text: the text side, if it is there already.

        Raises:
            CheckpointError, EngineConfigError, StoreError, OSError: the model cannot be loaded.
            EngineDeadError: the engine died while it loaded.
        """
        if self._fetch is not None:
            await self._download(self._fetch, progress)
            self._fetch = None
            progress = _after_download(progress)
        starting = asyncio.create_task(self._start_engine(config, progress))
        reading = asyncio.create_task(self._read_text(Path(config.model_path), text))
        try:
            engine, read = await asyncio.gather(starting, reading)
            if self._adapters is not None:
                await self._adapters.open(engine, progress)
            return Loaded(engine, read)
        except BaseException:  # of the first to fail; minutes of loading weights are not waited for
            starting.cancel()
            reading.cancel()
            [half, _] = await asyncio.gather(starting, reading, return_exceptions=True)
            if not isinstance(half, BaseException):
                await half.close()
            raise

    def abandoned(self, patience: float) -> bool:
        """Whether threads of loads that were given up go on after so many seconds; blocks. Who does not want to wait
        for them any longer ends the process."""
        end = time.monotonic() + patience
        for thread in self._abandoned:
            thread.join(max(0.0, end - time.monotonic()))
        return any(thread.is_alive() for thread in self._abandoned)

    async def _download(self, fetch: Fetch, progress: LoadProgress) -> None:
        given_up = threading.Event()
        report = _downloading(asyncio.get_running_loop(), progress, given_up)
        try:
            await self._in_thread(functools.partial(fetch, report))
        except asyncio.CancelledError:
            given_up.set()
            raise

    async def read_text(self, path: Path) -> TextModel:
        """The text side alone; raises CheckpointError."""
        return await self._in_thread(lambda: self._load_text(path))

    async def _read_text(self, path: Path, text: TextModel | None) -> TextModel:
        return await self.read_text(path) if text is None else text

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Not in asyncio's own threads: the end of the event loop waits for those, and these may take minutes."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def finish(result: T | None, error: BaseException | None) -> None:
            if done.cancelled():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            result, failure = None, None
            try:
                result = work()
            except BaseException as error:  # raised where it is waited for
                failure = error
            _in_loop(loop, lambda: finish(result, failure))

        thread = threading.Thread(target=run, name="loading", daemon=True)
        thread.start()
        try:
            return await done
        except asyncio.CancelledError:
            self._abandoned.append(thread)
            raise


def find_in(store: ModelStore, config: EngineConfig) -> Find:
    """Models of the store, run as `config` says. Names come from clients: a path is none, and nothing is fetched."""

    def find(name: str) -> EngineConfig:
        try:
            stored = store.named(name)
        except ValueError as error:
            raise invalid("model", str(error)) from None
        if stored is None:
            raise ServiceError(Code.NOT_FOUND, f"model {name!r} is not in the model store; `nemoserve pull` fetches it")
        return replace(config, model_path=str(stored.path))

    return find


def _downloading(loop: asyncio.AbstractEventLoop, progress: LoadProgress, given_up: threading.Event) -> Progress:
    """Bytes of a download, told from any thread, as the first part of a load's progress.

    Raises:
        StoreError: nobody waits for it any more.
    """

    def report(done: int, total: int) -> None:
        if given_up.is_set():
            raise StoreError("nobody waits for this download any more; what has arrived is kept")
        told = Done(done / total * DOWNLOAD_SHARE if total else 0.0, done, total)
        _in_loop(loop, lambda: progress(DOWNLOAD, told))

    return report


def _after_download(progress: LoadProgress) -> LoadProgress:
    rest = 1 - DOWNLOAD_SHARE
    return lambda phase, done: progress(phase, done._replace(fraction=DOWNLOAD_SHARE + rest * done.fraction))


def _in_loop(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        pass  # the loop is closed: nobody waits any more
