"""Loading streams: what it takes beside the weights is a slab, whatever the size of a tensor or of the file.

The peak is that of the resident set of a process of its own (VmHWM), which counts pages of mapped files too; files are
read and not mapped, so it is what the process really holds. Page cache of the files is the kernel's and not in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import open_checkpoint
from engine.model.load import load_decoder
from engine.schemes import SCHEMES
from tests.fp8_models import write_fp8
from tests.published_models import write_mistral, write_shards
from tests.tiny_models import config_json, random_weights, write_hf

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPE: dict[str, Any] = {
    "vocab_size": 32768,  # a table of 64 MiB in bfloat16
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 3584,
}
# A slab has a million weights: 2 MiB as stored, 4 MiB as float32, a handful of each while it is converted and packed.
# Measured: 4 MiB for what is kept as stored, 24 MiB for int4; the rest is room for other allocators.
BESIDE_THE_WEIGHTS = 64 * 2**20

SCRIPT = """
import sys
import torch
from pathlib import Path
from engine.checkpoint import open_checkpoint
from engine.model.load import load_decoder
from engine.schemes import SCHEMES

def status(key):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024

def load(path, precision):
    with torch.inference_mode(), open_checkpoint(path) as checkpoint:
        scheme = SCHEMES[precision]
        return load_decoder(checkpoint, torch.bfloat16, torch.device("cpu"), 64, 1, lambda phase, done: None, scheme)

torch.set_num_threads(1)
load(sys.argv[1], sys.argv[3])  # code and kernels
before = status("VmRSS")
weights = load(sys.argv[2], sys.argv[3]).weights.nbytes
print(weights, status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same 116 million weights in bfloat16 and in FP8, and tiny ones."""
    folder = tmp_path_factory.mktemp("large")
    config = config_json(**SHAPE, torch_dtype="bfloat16")
    weights = random_weights(config, dtype=torch.bfloat16)
    write_shards(folder / "bf16", weights, shards=2)
    (folder / "bf16" / "config.json").write_text(json.dumps(config))
    write_mistral(folder / "mistral", config, weights)
    write_fp8(folder / "fp8", "autofp8-static", **SHAPE)
    write_hf(folder / "tiny")
    yield folder
    for file in folder.rglob("*.safetensors"):
        file.unlink()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("form", "precision"), [("bf16", "auto"), ("bf16", "fp8"), ("bf16", "int4"), ("fp8", "auto"), ("mistral", "auto")]
)
def test_loading_takes_the_weights_and_a_slab(folder: Path, form: str, precision: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder / "tiny", folder / form, precision],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    weights, peak = map(int, answer.stdout.split())
    print(
        f"\n{form}, {precision}: {weights / 2**20:.0f} MiB of weights, {(peak - weights) / 2**20:.0f} MiB beside them"
    )
    assert weights * 0.9 < peak < weights + BESIDE_THE_WEIGHTS


def test_every_byte_of_a_file_is_read_about_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many slabs a matrix has. Heads of Mistral's form are read whole, so where slabs end inside one, twice."""
    read, preadv = 0, os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read
        count = preadv(descriptor, buffers, offset)
        read += count
        return count

    monkeypatch.setattr(os, "preadv", counted)
    for form, most in (("bf16", 1.01), ("mistral", 1.1)):
        read = 0
        with torch.inference_mode(), open_checkpoint(folder / form) as checkpoint:
            load_decoder(
                checkpoint, torch.bfloat16, torch.device("cpu"), 64, 1, lambda phase, done: None, SCHEMES["auto"]
            )
        stored = sum(file.stat().st_size for file in (folder / form).glob("*.safetensors"))
        assert 0.99 * stored < read < most * stored
