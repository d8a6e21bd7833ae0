"""What readers say of the bytes in a file is the file: progress of loading is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.checkpoint import open_checkpoint
from engine.checkpoint.layout import expected_tensors
from engine.gguf_header import read_header
from tests.fp8_models import DIALECTS, write_fp8
from tests.tiny_models import write_consolidated, write_gguf, write_hf


def stored(path: Path) -> int:
    with open_checkpoint(path) as checkpoint:
        return sum(checkpoint.stored_bytes(name) for name in expected_tensors(checkpoint.config))


def data_bytes(file: Path) -> int:
    """Of a safetensors file: all but its header."""
    return file.stat().st_size - 8 - int.from_bytes(file.open("rb").read(8), "little")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_safetensors_they_are_all_but_the_headers(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_hf(tmp_path / "hf", shards=3, dtype=dtype)
    assert stored(folder) == sum(map(data_bytes, folder.glob("*.safetensors")))


def test_of_a_consolidated_file_too(tmp_path: Path) -> None:
    folder = write_consolidated(tmp_path)
    assert stored(folder) == data_bytes(folder / "consolidated.safetensors")


@pytest.mark.parametrize("kind", DIALECTS)
def test_of_fp8_they_are_all_but_headers_and_scales(tmp_path: Path, kind: str) -> None:
    folder = write_fp8(tmp_path, kind, hidden_size=256, intermediate_size=512).folder
    assert 0.96 < stored(folder) / data_bytes(folder / "model.safetensors") < 1


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_of_a_gguf_file_all_but_metadata_and_padding(tmp_path: Path, kind: str) -> None:
    file = write_gguf(tmp_path / "a.gguf", kind=kind)
    header = read_header(file, lambda key: False)
    begin = min(tensor.offset for tensor in header.tensors.values())
    padding = file.stat().st_size - begin - stored(file)
    assert 0 <= padding < 32 * len(header.tensors)
