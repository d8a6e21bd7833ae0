"""Checkpoints from Hugging Face: its client tells what a repository holds, our own `download` fetches it.

So a file of a pull that was killed goes on where it ended, which the client's own download begins anew; HF_TOKEN,
HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean there. Weights are taken in one form only: Mistral's repositories
hold the model twice. Pickled weights are never fetched.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import httpx
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, lazily exported

from service.models.catalog import HubRepository
from service.models.download import (
    Progress,
    RefusedError,
    Verify,
    disk_error,
    download,
    ensure_space,
    verify_sha256,
)
from service.models.errors import StoreError

SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model*", "LICENSE*")
AT_ONCE = 4  # files; one connection rarely fills the line
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
        commit = info.sha or source.revision
        _Pull(where, files, folder, progress).run(
            {file.name: hf_hub_url(source.repo, file.name, revision=commit, endpoint=endpoint) for file in files}
        )
    return commit


class _Pull:
    """Files of one repository into one folder, some at a time; the first that fails ends the others."""

    def __init__(self, where: str, files: list[HubFile], folder: Path, progress: Progress) -> None:
        self._where = where
        self._files = files
        self._folder = folder
        self._progress = progress
        self._mutex = threading.Lock()
        self._done: dict[str, int] = {}
        self._total = sum(file.num_bytes for file in files)
        self._failed = threading.Event()

    def run(self, urls: dict[str, str]) -> None:
        missing = [file for file in self._files if not self._is_there(file)]
        begun = sum(_size(self._folder / f"{file.name}.partial") for file in missing)
        ensure_space(self._folder, sum(file.num_bytes for file in missing) - begun)
        with (
            httpx.Client(headers=build_hf_headers(), follow_redirects=True, timeout=30.0) as client,
            ThreadPoolExecutor(AT_ONCE, thread_name_prefix="pull") as pool,
        ):
            # Without the token on other hosts: httpx drops it where a redirect leaves the hub.
            work = [pool.submit(self._fetch, client, file, urls[file.name]) for file in missing]
            try:
                errors = [error for each in work if (error := each.exception()) is not None]
            except BaseException:  # Ctrl-C: the pool waits for its threads, which must not wait for their files
                self._failed.set()
                raise
        if errors:
            raise next((error for error in errors if not isinstance(error, _EndedError)), errors[0])
        self._progress(self._total, self._total)

    def _fetch(self, client: httpx.Client, file: HubFile, url: str) -> None:
        def report(done: int, total: int) -> None:
            if self._failed.is_set():
                raise _EndedError
            with self._mutex:
                self._done[file.name] = done
                self._progress(sum(self._done.values()), self._total)

        target = self._folder / file.name
        try:
            report(_size(target.with_name(f"{file.name}.partial")), file.num_bytes)
            download(client, url, target, verify=self._verify(file), num_bytes=file.num_bytes, progress=report)
        except RefusedError as error:
            self._failed.set()
            if error.status in (401, 403):
                raise StoreError(
                    f"{self._where}: may not be read; accept its licence on huggingface.co, then set HF_TOKEN"
                ) from None
            raise
        except BaseException:
            self._failed.set()
            raise

    def _is_there(self, file: HubFile) -> bool:
        """Whole and the repository's; else it is removed, for it may be of an earlier commit."""
        target = self._folder / file.name
        if not target.exists():
            return False
        try:
            if _size(target) == file.num_bytes:
                self._verify(file)(target)
                self._done[file.name] = file.num_bytes
                self._progress(sum(self._done.values()), self._total)  # to read them all takes minutes of a slow disk
                return True
            target.unlink()
        except StoreError:  # which has removed it
            pass
        return False

    def _verify(self, file: HubFile) -> Verify:
        return lambda path: _verify(self._where, path, file)


class _EndedError(Exception):
    """Another file has failed."""


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


def _verify(where: str, path: Path, file: HubFile) -> None:
    """See `service.models.download.Verify`."""
    if file.sha256:
        verify_sha256(path, file.sha256)
    elif file.blob_id:
        content = path.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        if found != file.blob_id:
            path.unlink()
            raise StoreError(f"{where}: {file.name} is not the repository's; the file was removed, try again")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


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
