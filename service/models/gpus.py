"""GPUs that people ask about, with what of their memory CUDA hands out: the card's own share is already off.

Totals are those of torch's out-of-memory messages on the real cards.
"""

from __future__ import annotations

from dataclasses import dataclass

_GIB = 2**30
FP8_SINCE = (8, 9)  # compute capability: Ada; Hopper is 9.0


@dataclass(frozen=True, slots=True)
class KnownGpu:
    """`capability`: CUDA's compute capability."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]

    @property
    def multiplies_fp8(self) -> bool:
        return self.capability >= FP8_SINCE


KNOWN_GPUS = (
    KnownGpu("L4 24 GB", int(22.0 * _GIB), (8, 9)),
    KnownGpu("RTX 4090 24 GB", int(23.6 * _GIB), (8, 9)),
    KnownGpu("A100 40 GB", int(39.4 * _GIB), (8, 0)),
    KnownGpu("A100 80 GB", int(79.1 * _GIB), (8, 0)),
    KnownGpu("H100 80 GB", int(79.1 * _GIB), (9, 0)),
    KnownGpu("H200 141 GB", int(139.8 * _GIB), (9, 0)),
)
