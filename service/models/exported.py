"""What `nemoserve store` leaves beside a model's files: its name, where it came from, its licence and checksums."""

from __future__ import annotations

from pathlib import Path

import msgspec

from service.models.errors import StoreError

MANIFEST = "nemoserve.json"
MANIFEST_BYTES = 2**20  # the largest that is read; a file's entry has some 150


class ExportedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the folder. `sha256` was computed while it was written."""

    name: str
    num_bytes: int
    sha256: str


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """A model as a folder of its own.

    Attributes:
        name: what it is served as.
        source: URI that it was fetched from; None for files of the user's own.
        licence: as the catalogue names it.
    """

    name: str
    source: str | None
    licence: str | None
    files: list[ExportedFile]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


def read_exported(folder: Path) -> Exported | None:
    """What is in this folder; None where `nemoserve store` did not write it.

    Raises:
        StoreError: the description is not one of ours, or what it describes is not all there.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    with path.open("rb") as opened:
        content = opened.read(MANIFEST_BYTES + 1)
    try:
        found = msgspec.json.decode(content, type=Exported)
    except msgspec.DecodeError as error:
        raise StoreError(f"{path}: not as `nemoserve store` writes it: {error}") from None
    for file in found.files:
        there = folder / file.name
        size = there.stat().st_size if there.is_file() else 0
        if size != file.num_bytes:
            raise StoreError(f"{folder}: {file.name} has {size} of its {file.num_bytes} bytes; copy the folder again")
    return found
