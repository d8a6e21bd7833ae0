"""What is measured: the 12.2 B NeMo on a card, or in a trial a model of the same kind that takes a CPU seconds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec

from engine.config import ModelConfig
from service.models.family import NEMO_12B


@dataclass(frozen=True, slots=True)
class Workload:
    """Shapes of everything.

    Attributes:
        batches, contexts: of decode, each with each. A context of 131,072 is the last token of a full one.
        prefills: lengths of prompts that are computed alone.
        max_batch_tokens: of one step, and so of one chunk of a prompt.
        streams: of requests from end to end, `prompt` tokens in and `new` out.
        steps: of decode that one figure is the median of, at most.
        rows: of activations and of linear maps as kernels are tried with.
        few, many: (context, new tokens) of each sequence, for attention: as in decode, and as in prefill.
    """

    model: ModelConfig
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prefills: tuple[int, ...]
    max_batch_tokens: int
    streams: tuple[int, ...]
    prompt: int
    new: int
    steps: int
    rows: tuple[int, ...]
    few: tuple[tuple[tuple[int, int], ...], ...]
    many: tuple[tuple[tuple[int, int], ...], ...]
    window: int

    def with_layers(self, layers: int) -> Workload:
        """The same with so many layers: what is missing is the time of the others alone."""
        return replace(self, model=msgspec.structs.replace(self.model, num_layers=layers))


FULL = Workload(
    model=NEMO_12B,
    batches=(1, 8, 64, 256),
    contexts=(1024, 8192, 131072),
    prefills=(1024, 8192, 131072),
    max_batch_tokens=8192,
    streams=(64, 256),
    prompt=1000,
    new=1000,
    steps=40,
    rows=(1, 4, 16, 64, 256),
    few=(
        ((1023, 1),) * 64,
        ((8191, 1),) * 8,
        ((131071, 1),),
        ((700, 1), (0, 1), (5000, 1), (63, 1), (64, 1)),  # of all lengths
        ((1000, 8), (37, 3), (0, 5)),  # drafts
    ),
    many=(((0, 8192),), ((8192, 1024), (0, 77), (300, 1))),
    window=500,
)
TRIAL = Workload(
    model=msgspec.structs.replace(
        NEMO_12B,
        vocab_size=512,
        hidden_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        intermediate_size=256,
        max_position_embeddings=512,
    ),
    batches=(1, 4),
    contexts=(64, 256),
    prefills=(32, 192),
    max_batch_tokens=64,
    streams=(4,),
    prompt=40,
    new=8,
    steps=6,
    rows=(1, 5, 20),
    few=(((60, 1), (0, 1), (200, 1)), ((30, 3), (5, 8))),
    many=(((0, 70), (20, 30)),),
    window=25,
)
