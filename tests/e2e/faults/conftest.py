"""The servers that the fault suite breaks, and how hard it tries."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.conftest import ServerProcess
from tests.service.text.conftest import small_tekken
from tests.tiny_models import write_hf

POISON = 1000 + 0xFF  # a token that no text has; the logits behind it are not numbers


@dataclass(frozen=True)
class Dose:
    """How much of each fault. `make test` gives enough to see that the row holds, `make faults` all of it."""

    overload_seconds: float = 4.0
    cancellations: int = 64
    deadlines: int = 24
    kills: int = 2
    mutations: int = 1_000
    idle_connections: int = 300


FULL = Dose(
    overload_seconds=60.0,
    cancellations=1_000,
    deadlines=400,
    kills=50,
    mutations=100_000,
    idle_connections=1_000,
)


@pytest.fixture(scope="session")
def dose(request: pytest.FixtureRequest) -> Dose:
    return FULL if request.config.getoption("--full-dose") else Dose()


@pytest.fixture(scope="module")
def embedded(smollm2_path: Path) -> Iterator[ServerProcess]:
    """The embedded model with little room: four requests run, eight wait."""
    room = ("--max-batch-size", "4", "--max-queue-size", "8", "--max-model-len", "1024")
    running = ServerProcess.start(smollm2_path, "--served-model-name", "model", *room, "--engine-restarts", "1000")
    yield running
    assert running.stop() == 0, "".join(running.lines)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with NeMo's chat format, of some thousand tokens a second. One coordinate of what it computes is
    zero for every token but POISON, and times one weight of the output that coordinate overflows. Another one is the
    same for every token, so that POISON is never drawn."""
    folder: Path = write_hf(tmp_path_factory.mktemp("faults"), vocab_size=9000, max_position_embeddings=4096)
    (folder / "tekken.json").write_text(json.dumps(small_tekken("v3")))
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[:2] = 0
    embedding = weights["model.embed_tokens.weight"]
    embedding[:, 0], embedding[:, 1] = 0, 1
    embedding[POISON, 0] = 10
    weights["lm_head.weight"][POISON, 1] = -1000
    weights["lm_head.weight"][7, 0] = torch.finfo(torch.float32).max
    save_file(weights, folder / "model.safetensors")
    return folder


TINY = ("--served-model-name", "model", "--dtype", "fp32", "--max-batch-size", "8", "--kv-memory", "3300000")


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Iterator[ServerProcess]:
    """A server so quick that what is slow is the clients, and with so few pages that they run out."""
    running = ServerProcess.start(tiny_model, *TINY, "--slow-reader-timeout", "1", "--engine-restarts", "1000")
    yield running
    assert running.stop() == 0, "".join(running.lines)
