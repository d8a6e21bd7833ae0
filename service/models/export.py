"""A model as a folder of its own: all of its files beside each other, and what they are. For where no network is.

DIR/nemoserve.json is written last: with it the folder is whole, and `serve DIR` knows the model by its own name.
"""

from __future__ import annotations

import hashlib
import os
from fnmatch import fnmatch
from pathlib import Path

import msgspec

from service.models import catalog
from service.models.download import Progress, commit, disk_error, ensure_space
from service.models.errors import StoreError
from service.models.exported import MANIFEST, Exported, ExportedFile
from service.models.store import ModelStore

_TAKEN = ("*.json", "*.jinja", "tokenizer.model*", "LICENSE*", "README.md", "*.safetensors", "*.gguf")
_CHUNK = 8 * 2**20


def export(store: ModelStore, reference: str, folder: Path, progress: Progress = lambda done, total: None) -> Exported:
    """Copy a model that is there into `folder`, in which nothing may be but an earlier attempt at it.

    Raises:
        StoreError: the folder has other things in it, the model is not there, or the disk is full.
    """
    stored = store.find(reference)
    if stored is None:
        raise StoreError(f"{reference}: not in the store; `nemoserve pull {reference}` fetches it")
    files = _files(stored.path)
    sizes = {path: path.stat().st_size for path in files}
    total, done = sum(sizes.values()), 0
    try:
        _make_empty(folder, {path.name for path in files})
        ensure_space(folder, total, "choose a larger disk")
        entries = []
        for path in files:
            sha256 = _copy(path, folder / path.name, done, total, progress)
            entries.append(ExportedFile(name=path.name, num_bytes=sizes[path], sha256=sha256))
            done += sizes[path]
        entry = catalog.find(reference)
        made = Exported(
            name=stored.name,
            source=store.source_of(reference),
            licence=entry.licence if entry else None,
            files=entries,
        )
        partial = folder / f"{MANIFEST}.partial"
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=2) + b"\n")
        commit(partial, folder / MANIFEST)
    except OSError as error:
        raise disk_error(folder / MANIFEST, total - done, error, "choose a larger disk") from None
    return made


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(each for each in path.iterdir() if each.is_file() and any(fnmatch(each.name, it) for it in _TAKEN))


def _make_empty(folder: Path, ours: set[str]) -> None:
    """Remove what an earlier attempt left, the description first, and refuse a folder with anything else."""
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder}: is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    names = set(os.listdir(folder))
    begun = {MANIFEST, *(f"{name}.partial" for name in (MANIFEST, *ours)), *ours}
    if other := sorted(names - begun):
        raise StoreError(f"{folder}: has {other[0]} in it; name an empty folder, or a new one")
    for name in sorted(names, key=lambda name: name != MANIFEST):
        (folder / name).unlink()


def _copy(source: Path, target: Path, done: int, total: int, progress: Progress) -> str:
    """Under its own name only when all of it is written; returns its sha256."""
    digest = hashlib.sha256()
    partial = target.with_name(f"{target.name}.partial")
    with source.open("rb") as read, partial.open("wb") as written:
        while chunk := read.read(_CHUNK):
            digest.update(chunk)
            written.write(chunk)
            done += len(chunk)
            progress(done, total)
    commit(partial, target)
    return digest.hexdigest()
