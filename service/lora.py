"""The folder of LoRA adapters: each subfolder is one, under its own name.

    FOLDER/NAME/adapter_config.json, adapter_model.safetensors      as PEFT saves them
    FOLDER/NAME/params.json, lora.safetensors                       as mistral-finetune does

They are loaded when the server starts, when a client asks for it, and when they change, if somebody watches. One that
cannot be loaded is told of and does not stop the others. Names come from clients: only the plain name of a folder that
is there is ever opened.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from engine import (
    AdapterInfo,
    AdapterLimitError,
    CheckpointError,
    Done,
    Engine,
    EngineConfigError,
    EngineDeadError,
    EngineError,
    LoadProgress,
)
from service.errors import Code, ServiceError, from_engine, invalid

log = logging.getLogger(__name__)

FILES = ("adapter_config.json", "adapter_model.safetensors", "params.json", "lora.safetensors")
UNLOADED = "unloaded"  # Triton's word for what a client has unloaded
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,127}")

Version = tuple[tuple[str, int, int], ...]
"""Names, sizes and times of an adapter's files; another one means that it has to be read again."""


class LoraFolder:
    """See the module and `service.host.Loras`. Belongs to one event loop.

    Args:
        taken: names that no adapter can have, because they mean the model itself.
    """

    def __init__(self, folder: Path, taken: Collection[str] = ()) -> None:
        self._folder = folder
        self._taken = frozenset(taken)
        self._engine: Engine | None = None
        self._seen: dict[str, Version] = {}  # what was loaded, or tried, or unloaded by hand
        self._absent: dict[str, str] = {}
        self._one_at_a_time = asyncio.Lock()

    @property
    def loaded(self) -> Mapping[str, AdapterInfo]:
        return {} if self._engine is None else {adapter.name: adapter for adapter in self._engine.adapters}

    @property
    def absent(self) -> Mapping[str, str]:
        return self._absent

    async def open(self, engine: Engine, progress: LoadProgress) -> None:
        """Load all that there are into an engine that has none, but those that a client has unloaded.

        Args:
            progress: called before each.

        Raises:
            OSError: the folder cannot be read.
        """
        self._engine = engine
        self._seen = {name: seen for name, seen in self._seen.items() if self._absent.get(name) == UNLOADED}
        await self.refresh(progress)

    async def load(self, name: str) -> None:
        """See `service.host.Loras.load`."""
        _check_name(name)
        async with self._one_at_a_time:
            version = await asyncio.to_thread(_version, self._folder / name)
            if version is None:
                raise ServiceError(Code.NOT_FOUND, f"no LoRA adapter {name!r} in the server's folder of adapters")
            await self._load(name, version)

    async def unload(self, name: str) -> None:
        """See `service.host.Loras.unload`."""
        async with self._one_at_a_time:
            try:
                self._opened().unload_adapter(name)
            except EngineError as error:
                raise from_engine(error) from error
            self._absent[name] = UNLOADED
            log.info("LoRA adapter unloaded", extra={"adapter": name})

    async def watch(self, seconds: float) -> None:
        """Refresh for ever, after so many seconds each time."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.refresh()
            except OSError as error:  # what is loaded stays
                log.warning("the folder of LoRA adapters cannot be read", extra={"reason": str(error)})

    async def refresh(self, progress: LoadProgress = lambda phase, done: None) -> None:
        """Load what is new or has changed since it was last seen, unload what is gone.

        Raises:
            OSError: the folder cannot be read.
        """
        async with self._one_at_a_time:
            found = await asyncio.to_thread(self._scan)
            for name in self._seen.keys() - found.keys():
                self._forget(name)
            for name, version in found.items():
                progress("load adapters", Done(1.0))
                if self._seen.get(name) == version:
                    continue
                try:
                    await self._load(name, version)
                except ServiceError as error:
                    log.warning("LoRA adapter not loaded", extra={"adapter": name, "reason": error.message})

    def _scan(self) -> dict[str, Version]:
        names = sorted(entry.name for entry in self._folder.iterdir() if not entry.name.startswith("."))
        versions = {name: _version(self._folder / name) for name in names}
        return {name: version for name, version in versions.items() if version is not None}

    async def _load(self, name: str, version: Version) -> None:
        """Raises ServiceError, and keeps the reason, if it cannot be loaded."""
        engine = self._opened()
        self._seen[name] = version
        try:
            _check_name(name)
            if name in self._taken:
                raise invalid("model_name", f"{name!r} is a name of the model itself; an adapter needs one of its own")
            try:
                info = await engine.load_adapter(name, str(self._folder / name))
            except EngineError as error:
                raise self._refusal(error) from error
        except ServiceError as error:
            if _NAME.fullmatch(name) and name not in self.loaded:  # an older version may serve on
                self._absent[name] = error.message
            raise
        self._absent.pop(name, None)
        log.info("LoRA adapter loaded", extra={"adapter": name, "rank": info.rank, "bytes": info.nbytes})

    def _forget(self, name: str) -> None:
        del self._seen[name]
        self._absent.pop(name, None)
        if name in self.loaded:
            with suppress(EngineDeadError):  # the next engine does not get it
                self._opened().unload_adapter(name)
            log.info("LoRA adapter unloaded", extra={"adapter": name, "reason": "its folder is gone"})

    def _refusal(self, error: EngineError) -> ServiceError:
        if isinstance(error, AdapterLimitError):
            return ServiceError(Code.RESOURCE_EXHAUSTED, self._relative(error))
        if isinstance(error, CheckpointError | EngineConfigError):
            return ServiceError(Code.FAILED_PRECONDITION, self._relative(error))
        return from_engine(error)

    def _relative(self, error: EngineError) -> str:
        """Where the folder is is nobody's business."""
        return str(error).replace(f"{self._folder}/", "")

    def _opened(self) -> Engine:
        if self._engine is None:
            raise ServiceError(Code.UNAVAILABLE, "the model is loading; retry later")
        return self._engine


def _version(folder: Path) -> Version | None:
    """None if there is no adapter."""
    found = []
    for file in FILES:
        try:
            status = (folder / file).stat()
            found.append((file, status.st_size, status.st_mtime_ns))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:  # links in a circle, no permission: who reads it tells
            found.append((file, 0, 0))
    return tuple(found) or None


def _check_name(name: str) -> None:
    """Raises ServiceError: INVALID_ARGUMENT, no adapter can be called so."""
    if not _NAME.fullmatch(name):
        raise invalid("model_name", f"{name!r} must be the name of a folder of adapters, as {_NAME.pattern}")
