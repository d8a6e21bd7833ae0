"""Checkpoints from Hugging Face, through huggingface_hub: it resumes, checks, and honours HF_TOKEN and HF_HUB_OFFLINE.

Weights are taken in one form only: Mistral's repositories hold the model twice. Pickled weights are never fetched.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from service.models.catalog import HubRepository
from service.models.download import disk_error
from service.models.errors import StoreError

_SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model*", "LICENSE*"]


def pull_repository(source: HubRepository, folder: Path) -> None:
    """Fill `folder` with configuration, tokenizer and safetensors; progress goes to the terminal.

    Raises:
        StoreError: one line that says what to do.
    """
    where = f"{source.repo}@{source.revision}"
    try:
        names = HfApi().list_repo_files(source.repo, revision=source.revision)
        snapshot_download(
            source.repo,
            revision=source.revision,
            local_dir=folder,
            allow_patterns=[*_SMALL_FILES, *weight_patterns(where, names)],
        )
    except GatedRepoError:
        raise StoreError(f"{where}: accept its licence on huggingface.co, then set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise StoreError(f"{where}: no such model on Hugging Face, or a private one and HF_TOKEN is not set") from None
    except RevisionNotFoundError:
        raise StoreError(f"{where}: no such revision") from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError):
        raise StoreError(f"{where}: Hugging Face cannot be reached (or HF_HUB_OFFLINE is set)") from None
    except HfHubHTTPError as error:
        raise StoreError(f"{where}: Hugging Face answers {error.response.status_code}") from None
    except OSError as error:
        raise disk_error(folder / "files", 0, error) from None


def weight_patterns(where: str, names: list[str]) -> list[str]:
    """Which weight files of a repository to take: Hugging Face's form if it is there, else Mistral's.

    Raises:
        StoreError: there are no safetensors.
    """
    if any(name.startswith("model") and name.endswith(".safetensors") for name in names):
        return ["model*.safetensors"]
    if "consolidated.safetensors" in names:
        return ["consolidated.safetensors"]
    raise StoreError(f"{where}: has no safetensors weights")
