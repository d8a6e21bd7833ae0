"""What grammars forbid: masks of bits, packed as the host has them, over the logits of the rows that they are for.

A mask is 16 KiB for 131,072 tokens, so that 32 of them are copied in the time of a few launches; on the device a bit
becomes a bool by one look into a table of 256 bytes' bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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
    allowed = unpack(bytes_to_device(packed, logits.device).view(len(where), -1), logits.shape[-1])
    if len(where) == len(rows):
        logits.masked_fill_(~allowed, -math.inf)
    else:
        index = to_device(where, torch.int64, logits.device)
        logits[index] = logits[index].masked_fill_(~allowed, -math.inf)


def unpack(packed: Tensor, size: int) -> Tensor:
    """Bits of uint8 [S, bytes], the lowest first, as bool [S, size]."""
    values = torch.arange(256, dtype=torch.uint8, device=packed.device)
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    table = (values[:, None] >> places & 1).bool()
    return table[packed.int()].flatten(1)[:, :size]
