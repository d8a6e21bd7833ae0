"""What grammars forbid: masks of bits, packed as the host has them, over the logits of the rows that they are for.

A mask is 16 KiB for 131,072 tokens. A GPU gets the bits and takes them apart itself: there are eight times as many
bytes to copy otherwise. On a CPU numpy takes them apart, in a tenth of the time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.transfer import bytes_to_device, to_device


def forbid(logits: Tensor, rows: Sequence[int], masks: Mapping[int, bytes]) -> None:
    """Make impossible (-inf) what the masks do not allow.

    Args:
        logits: float32 [K, V]; changed in place.
        rows: the K rows that they belong to; choices of one row stand side by side.
        masks: by row, as in `engine.step.Masks`; of other rows everything is allowed.
    """
    where = [index for index, row in enumerate(rows) if row in masks]
    if not where:
        return
    packed = b"".join(masks[row] for row in dict.fromkeys(rows) if row in masks)
    unpack = unpack_on_host if logits.device.type == "cpu" else unpack_on_device
    forbidden = unpack(packed, len(where), logits.shape[-1], logits.device)
    if len(where) == len(rows):
        logits.masked_fill_(forbidden, -math.inf)
    elif logits.device.type == "cpu":
        for row, each in zip(where, forbidden, strict=True):
            logits[row].masked_fill_(each, -math.inf)
    else:
        index = to_device(where, torch.int64, logits.device)
        logits[index] = logits[index].masked_fill_(forbidden, -math.inf)


def unpack_on_host(packed: bytes, count: int, size: int, device: torch.device) -> Tensor:
    """What `count` masks side by side do not allow, bool [count, size]."""
    bits = ~np.frombuffer(packed, np.uint8).reshape(count, -1)
    return torch.from_numpy(np.unpackbits(bits, axis=1, count=size, bitorder="little")).view(torch.bool)


def unpack_on_device(packed: bytes, count: int, size: int, device: torch.device) -> Tensor:
    """The same, with the work done by the device."""
    bits = bytes_to_device(packed, device).view(count, -1, 1)
    places = torch.arange(8, dtype=torch.uint8, device=device)
    return (bits >> places & 1 == 0).flatten(1)[:, :size]
