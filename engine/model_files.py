"""Which form a model on disk has, told by the names of its files alone: torch-free, for whoever must know it early."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path

from engine.errors import CheckpointError, UnsupportedModelError

HF_CONFIG, HF_WEIGHTS, HF_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MISTRAL_CONFIG, MISTRAL_WEIGHTS = "params.json", "consolidated.safetensors"
MISTRAL_INDEX = "consolidated.safetensors.index.json"
_PICKLED = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
_USE_INSTEAD = (
    "use the model's *.safetensors with config.json (Hugging Face), its consolidated.safetensors with params.json "
    "(Mistral), or a .gguf file"
)


class ModelForm(Enum):
    """Who published it so."""

    GGUF = "a .gguf file"
    HF = "config.json and safetensors"
    MISTRAL = "params.json and consolidated.safetensors"


def form_of(path: Path) -> ModelForm:
    """Of a file or folder. A folder that holds both Hugging Face's and Mistral's files is Hugging Face's.

    Raises:
        CheckpointError: there is nothing, or no model.
        UnsupportedModelError: a form that models are published in and that is not read; the message has what to use.
    """
    if path.is_dir():
        return _form_of_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.suffix == ".gguf":
        return ModelForm.GGUF
    if path.suffix == ".safetensors":
        return ModelForm.MISTRAL if path.name == MISTRAL_WEIGHTS else ModelForm.HF
    _refuse(path, {path.name})
    raise CheckpointError(f"{path}: a model is a .gguf file, a .safetensors file or a folder")


def _form_of_folder(folder: Path) -> ModelForm:
    try:
        names = set(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from None
    if HF_CONFIG in names and names & {HF_INDEX, HF_WEIGHTS}:
        return ModelForm.HF
    if MISTRAL_CONFIG in names and names & {MISTRAL_INDEX, MISTRAL_WEIGHTS}:
        return ModelForm.MISTRAL
    _refuse(folder, names)
    if HF_CONFIG in names:
        return ModelForm.HF  # its reader says which file is missing
    if MISTRAL_CONFIG in names:
        return ModelForm.MISTRAL
    raise CheckpointError(f"{folder}: neither {HF_CONFIG} nor {MISTRAL_CONFIG} is in this folder")


def _refuse(path: Path, names: set[str]) -> None:
    """Refuse NVIDIA's archives, packed or not, and pickles.

    Args:
        names: the file's, or of all in the folder.
    """
    if any(name.endswith(".nemo") for name in names) or {"context", "weights"} <= names or "model_weights" in names:
        raise UnsupportedModelError(f"{path}: NVIDIA NeMo's form of a checkpoint is not read; {_USE_INSTEAD}")
    if pickled := next((name for name in sorted(names) if name.endswith(_PICKLED)), None):
        raise UnsupportedModelError(
            f"{path}: {pickled} is pickled, and to read a pickle is to run what is in it; {_USE_INSTEAD}"
        )
