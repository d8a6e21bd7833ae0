"""Files to named tensors: whichever form a checkpoint has, its tensors have one set of names and one RoPE order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from torch import Tensor

from engine.checkpoint.gguf import GGUFCheckpoint
from engine.checkpoint.hf import open_hf
from engine.checkpoint.mistral import open_mistral
from engine.config import ModelConfig
from engine.model_files import ModelForm, form_of
from engine.quant.matrix import Matrix

__all__ = ["Checkpoint", "open_checkpoint"]


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
    match form_of(path):
        case ModelForm.GGUF:
            return GGUFCheckpoint(path)
        case ModelForm.MISTRAL:
            return open_mistral(path if path.is_dir() else path.parent)
        case ModelForm.HF:
            return open_hf(path) if path.is_dir() else open_hf(path.parent, path)
