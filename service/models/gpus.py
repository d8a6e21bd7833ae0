"""GPUs that people ask about, with what of their memory CUDA hands out: the card's own share is already off.

Totals are those of torch's out-of-memory messages on the real cards.
"""

from __future__ import annotations

from dataclasses import dataclass

_GIB = 2**30
FP8_SINCE = (8, 9)  # compute capability: Ada; Hopper is 9.0


@dataclass(frozen=True, slots=True)
class KnownGpu:
    """`slug`: its part of a profile's id. `capability`: CUDA's compute capability."""

    slug: str
    name: str
    memory_bytes: int
    capability: tuple[int, int]

    @property
    def multiplies_fp8(self) -> bool:
        return self.capability >= FP8_SINCE


KNOWN_GPUS = (
    KnownGpu("l4", "L4 24 GB", int(22.0 * _GIB), (8, 9)),
    KnownGpu("rtx4090", "RTX 4090 24 GB", int(23.6 * _GIB), (8, 9)),
    KnownGpu("a100-40gb", "A100 40 GB", int(39.4 * _GIB), (8, 0)),
    KnownGpu("l40s", "L40S 48 GB", int(44.4 * _GIB), (8, 9)),
    KnownGpu("a100-80gb", "A100 80 GB", int(79.1 * _GIB), (8, 0)),
    KnownGpu("h100", "H100 80 GB", int(79.1 * _GIB), (9, 0)),
    KnownGpu("h200", "H200 141 GB", int(139.8 * _GIB), (9, 0)),
)


def find_gpu(name: str) -> KnownGpu:
    """The GPU that a person means: "h100", "A100 80GB", "rtx-4090".

    Raises:
        ValueError: none, or more than one, is called so; the message has those that are.
    """
    wanted = _plain(name)
    found = [gpu for gpu in KNOWN_GPUS if wanted and wanted in (_plain(gpu.slug), _plain(gpu.name))]
    found = found or [gpu for gpu in KNOWN_GPUS if wanted and _plain(gpu.name).startswith(wanted)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{name!r} may be {' or '.join(gpu.slug for gpu in found)}")
    known = ", ".join(gpu.slug for gpu in KNOWN_GPUS)
    raise ValueError(f"{name!r} is not among {known}; --memory GiB plans for any other")


def recognise(device_name: str, memory_bytes: int) -> KnownGpu | None:
    """The known GPU that a driver's name ("NVIDIA H100 80GB HBM3") and size belong to."""
    words = _plain(device_name)
    near = [gpu for gpu in KNOWN_GPUS if abs(gpu.memory_bytes - memory_bytes) < 0.05 * memory_bytes]
    return next((gpu for gpu in near if _plain(gpu.slug.split("-")[0]) in words), None)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
