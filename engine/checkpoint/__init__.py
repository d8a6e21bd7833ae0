"""Files to named tensors: whichever form a checkpoint has, its tensors have one set of names and one RoPE order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from torch import Tensor

from engine.checkpoint import hf, mistral
from engine.checkpoint.gguf import GGUFCheckpoint
from engine.config import ModelConfig
from engine.errors import CheckpointError, UnsupportedModelError
from engine.quant.matrix import Matrix

__all__ = ["Checkpoint", "open_checkpoint"]

_USE_INSTEAD = (
    "use the model's *.safetensors with config.json (Hugging Face), its consolidated.safetensors with params.json "
    "(Mistral), or a .gguf file"
)
_PICKLED = (".bin", ".pth", ".pt", ".ckpt", ".pkl")


class Checkpoint(Protocol):
    """An open checkpoint, completely checked but for the values of its tensors.

    Names are those of Hugging Face's Llama; query and key rows are in rotate-half order whatever the file's order is.

    Attributes:
        num_parameters: numbers stored, a tied head counted once.
    """

    @property
    def config(self) -> ModelConfig: ...

    @property
    def num_parameters(self) -> int: ...

    def read(self, name: str) -> Tensor:
        """A vector (norm, bias) or a whole matrix as floats; the file's float type, float32 if it is quantised."""

    def matrix(self, name: str, start: int = 0, stop: int | None = None) -> Matrix:
        """Rows start .. stop - 1 of a matrix as the file stores them. Only these rows are in memory afterwards, so that
        a caller who goes slab by slab needs no more than a slab. Raises CheckpointError for weights that are not
        finite."""

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor in its file, for telling how far reading is."""

    def close(self) -> None: ...


@contextmanager
def open_checkpoint(path: str | Path) -> Iterator[Checkpoint]:
    """Open a `.gguf` file, a `.safetensors` file with config.json beside it, or a folder.

    A folder that holds both Hugging Face's and Mistral's files is read as Hugging Face's. Pickled weights and NVIDIA's
    `.nemo` archives are refused.

    Raises:
        CheckpointError: a file is missing, truncated, corrupt or not what its configuration says.
        UnsupportedModelError: a model that this decoder does not implement.
    """
    checkpoint = _open(Path(path))
    try:
        yield checkpoint
    finally:
        checkpoint.close()


def _open(path: Path) -> Checkpoint:
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.suffix == ".gguf":
        return GGUFCheckpoint(path)
    if path.suffix == ".safetensors":
        return mistral.open_mistral(path.parent) if path.name == mistral.WEIGHTS else hf.open_hf(path.parent, path)
    _refuse(path, {path.name})
    raise CheckpointError(f"{path}: a model is a .gguf file, a .safetensors file or a folder")


def _open_folder(folder: Path) -> Checkpoint:
    try:
        names = set(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from None
    if "config.json" in names and names & {hf.INDEX, hf.SINGLE}:
        return hf.open_hf(folder)
    if mistral.PARAMS in names and names & {mistral.INDEX, mistral.WEIGHTS}:
        return mistral.open_mistral(folder)
    _refuse(folder, names)
    if "config.json" in names:
        return hf.open_hf(folder)  # which says what is missing
    if mistral.PARAMS in names:
        return mistral.open_mistral(folder)
    raise CheckpointError(f"{folder}: neither config.json nor {mistral.PARAMS} is in this folder")


def _refuse(path: Path, names: set[str]) -> None:
    """Forms that models are published in and that are not read here, with what to use.

    Args:
        path: a file, or a folder.
        names: the file's, or of all in the folder.
    """
    if any(name.endswith(".nemo") for name in names) or {"context", "weights"} <= names or "model_weights" in names:
        raise UnsupportedModelError(f"{path}: NVIDIA NeMo's form of a checkpoint is not read; {_USE_INSTEAD}")
    if pickled := next((name for name in sorted(names) if name.endswith(_PICKLED)), None):
        raise UnsupportedModelError(
            f"{path}: {pickled} is pickled, and to read a pickle is to run what is in it; {_USE_INSTEAD}"
        )
