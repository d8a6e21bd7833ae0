"""The same weights in the file that each server reads best, made once and kept in a folder.

hf/                   bfloat16 safetensors, for vLLM, transformers and ourselves
<source>.gguf         where the weights come from, or the same shapes with other random weights
<TYPE>.gguf           as llama.cpp's own quantiser makes them from that
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import msgspec
import transformers
from safetensors.torch import save_file
from torch import Tensor

from bench.checkpoints import hf_config, write_checkpoint
from bench.options import model_path
from bench.vocabularies import TEKKEN, mistral_file
from engine.checkpoint import open_checkpoint
from engine.checkpoint.layout import expected_tensors
from engine.model.load import TensorSource
from service.models.family import NEMO_12B

NEMO_1B = "nemo-1b"
# The decoder that NeMo is, at a tenth: fewer and narrower layers, a query width that is not the hidden size, its whole
# vocabulary. 1.2e9 parameters, of which a step reads 0.96e9.
NEMO_1B_SHAPE = msgspec.structs.replace(
    NEMO_12B, hidden_size=2048, num_layers=16, num_heads=12, num_kv_heads=4, intermediate_size=5632
)


@dataclass(frozen=True, slots=True)
class Weights:
    """One model in several files.

    Attributes:
        hf: folder of bfloat16 safetensors.
        gguf: the file that `quantised` starts from.
    """

    hf: Path
    gguf: Path

    def quantised(self, kind: str, binaries: Path) -> Path:
        """A GGUF file of llama.cpp's type `kind`, such as Q8_0 or BF16; made now unless it is there."""
        target = self.hf.parent / f"{kind}.gguf"
        if not target.exists():
            unfinished = target.with_suffix(".unfinished")
            command = [binaries / "llama-quantize", "--allow-requantize", self.gguf, unfinished, kind]
            subprocess.run([str(part) for part in command], check=True, capture_output=True)
            os.replace(unfinished, target)
        return target


def prepare(model: str, folder: Path) -> Weights:
    """Make what is missing.

    Args:
        model: NEMO_1B, or what `bench.options.model_path` takes if that is a .gguf file.
        folder: of its own for each model; made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if model == NEMO_1B:
        tekken = mistral_file(TEKKEN)
        hf, q4 = folder / "hf", folder / "source"
        if not hf.exists():
            write_checkpoint("bf16", _fresh(hf), NEMO_1B_SHAPE, tekken).rename(hf)
        if not q4.exists():
            write_checkpoint("gguf-q4_k_m", _fresh(q4), NEMO_1B_SHAPE, tekken).parent.rename(q4)
        return Weights(hf, next(q4.glob("*.gguf")))
    source = model_path(model)
    hf = folder / "hf"
    if not hf.exists():
        _widen(source, _fresh(hf)).rename(hf)
    return Weights(hf, source)


def _fresh(folder: Path) -> Path:
    """A name beside it for what is not whole yet; whatever was left there is removed."""
    unfinished = folder.with_suffix(".unfinished")
    if unfinished.exists():
        for file in unfinished.iterdir():
            file.unlink()
        unfinished.rmdir()
    return unfinished


def _widen(source: Path, target: Path) -> Path:
    """A GGUF file in bfloat16, with its tokenizer."""
    target.mkdir()
    with open_checkpoint(str(source)) as checkpoint:
        shapes = expected_tensors(checkpoint.config)
        tensors = {name: _tensor(checkpoint, name, len(shape)) for name, shape in shapes.items()}
        (target / "config.json").write_text(json.dumps(hf_config(checkpoint.config), indent=2))
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    tokenizer.save_pretrained(target)
    return target


def _tensor(checkpoint: TensorSource, name: str, dimensions: int) -> Tensor:
    read = checkpoint.read(name) if dimensions == 1 else checkpoint.matrix(name).dequantise()
    return read.bfloat16().contiguous()
