"""Checkpoints from Hugging Face, through huggingface_hub, which resumes and honours HF_TOKEN and HF_HUB_OFFLINE.

Weights are taken in one form only: Mistral's repositories hold the model twice. Pickled weights are never fetched.
huggingface_hub hands back a folder that it began earlier when the network fails, so every file is checked here.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from service.models.catalog import HubRepository
from service.models.download import Progress, disk_error, ensure_space, verify
from service.models.errors import StoreError

SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model*", "LICENSE*")
REPORT_SECONDS = 0.5
# With the base of all errors of the HTTP client that this release is built on: requests, httpx or httpx2.
_CLIENT_ERRORS: tuple[type[BaseException], ...] = (OSError, *HfHubHTTPError.__bases__)


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository. `sha256` is known of large files; small ones are git blobs, known by `blob_id`."""

    name: str
    num_bytes: int
    sha256: str | None
    blob_id: str | None


def pull_repository(source: HubRepository, folder: Path, progress: Progress, endpoint: str | None = None) -> str:
    """Fill `folder` with configuration, tokenizer and safetensors; returns the commit that they are of.

    Args:
        endpoint: address of the hub; None = HF_ENDPOINT or huggingface.co.

    Raises:
        StoreError: one line that says what to do.
    """
    where = f"{source.repo}@{source.revision}"
    with _errors(where, folder):
        info = HfApi(endpoint=endpoint).model_info(source.repo, revision=source.revision, files_metadata=True)
        files = [
            HubFile(each.rfilename, each.size or 0, each.lfs.sha256 if each.lfs else None, each.blob_id)
            for each in info.siblings or []
        ]
        files = choose_files(where, files)
        total = sum(file.num_bytes for file in files)
        ensure_space(folder, total - _bytes_below(folder))
        disable_progress_bars()  # ours tells it
        with _reporting(folder, total, progress):
            snapshot_download(
                source.repo,
                revision=info.sha,
                local_dir=folder,
                allow_patterns=[file.name for file in files],
                endpoint=endpoint,
            )
    for file in files:
        _check(where, folder / file.name, file)
    return info.sha or source.revision


def choose_files(where: str, files: list[HubFile]) -> list[HubFile]:
    """What to take of a repository: small files, and weights in Hugging Face's form if it is there, else Mistral's.

    Raises:
        StoreError: there are no safetensors.
    """
    files = [file for file in files if "/" not in file.name]  # other folders hold other formats
    for pattern in ("model*.safetensors", "consolidated*.safetensors"):
        if any(fnmatch(file.name, pattern) for file in files):
            return [file for file in files if any(fnmatch(file.name, each) for each in (*SMALL_FILES, pattern))]
    raise StoreError(
        f"{where}: has no safetensors weights, and pickled weights and .nemo archives are not fetched; "
        "use a repository that has the model as *.safetensors, or a .gguf file"
    )


def _check(where: str, path: Path, file: HubFile) -> None:
    """Refuse a file that is missing, cut short or not the repository's."""
    size = path.stat().st_size if path.exists() else None
    if size != file.num_bytes:
        raise StoreError(f"{where}: {file.name} has {size or 0} of its {file.num_bytes} bytes; try again")
    if file.sha256:
        verify(path, file.sha256)
    elif file.blob_id:
        found = hashlib.sha1(b"blob %d\0" % size + path.read_bytes(), usedforsecurity=False).hexdigest()
        if found != file.blob_id:
            path.unlink()
            raise StoreError(f"{where}: {file.name} is not the repository's; the file was removed, try again")


@contextmanager
def _reporting(folder: Path, total: int, progress: Progress) -> Iterator[None]:
    """Report the bytes in a folder while others fill it."""
    ended = threading.Event()

    def report() -> None:
        while not ended.wait(REPORT_SECONDS):
            progress(min(_bytes_below(folder), total), total)

    thread = threading.Thread(target=report, name="pull-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    progress(total, total)


def _bytes_below(folder: Path) -> int:
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # renamed since
                size += os.stat(os.path.join(place, name)).st_size
    return size


@contextmanager
def _errors(where: str, folder: Path) -> Iterator[None]:
    """What the hub's client raises, as one line that says what to do."""
    try:
        yield
    except GatedRepoError:
        raise StoreError(f"{where}: accept its licence on huggingface.co, then set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise StoreError(f"{where}: no such model on Hugging Face, or a private one and HF_TOKEN is not set") from None
    except RevisionNotFoundError:
        raise StoreError(f"{where}: no such revision") from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError):
        raise StoreError(
            f"{where}: Hugging Face cannot be reached (or HF_HUB_OFFLINE is set); what has arrived is kept, try again"
        ) from None
    except HFValidationError as error:
        raise StoreError(f"{where}: {error}") from None
    except HfHubHTTPError as error:
        code = error.response.status_code
        hint = "; set HF_TOKEN to a token that may read it" if code in (401, 403) else "; try again later"
        raise StoreError(f"{where}: Hugging Face answers {code}{hint}") from None
    except _CLIENT_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise disk_error(folder / "files", 0, error) from None
        raise StoreError(
            f"{where}: Hugging Face cannot be reached: {error or type(error).__name__}; "
            "what has arrived is kept, try again"
        ) from None
