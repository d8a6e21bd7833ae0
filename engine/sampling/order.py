"""One order of tokens for everything that ranks them: the higher logit first, the lower id among equals.

Logits that come from bfloat16 are often equal, and `topk` promises nothing about equals. Here a logit and its index
make one integer without a twin, so that the order is the same on every device, for every n and beside any other rows:

    key, int64:   | float32 bits, made monotonic (32) | length - 1 - index (32) |

The n likeliest tokens of a large vocabulary lie in the n best blocks, because a block that comes before another one has
a token that comes before all of the other's. So one cheap pass finds the largest logit of each block, and only the n
best blocks are ranked token by token.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 16
_LOW_32 = 2**32 - 1


def likeliest(logits: Tensor, n: int) -> Tensor:
    """Ids int64 [S, n] of the first n <= V tokens, in order, of float32 [S, V]. Valid ids even if logits are NaN."""
    vocab = logits.shape[-1]
    if vocab % BLOCK or 2 * n * BLOCK > vocab:
        return _first(logits, n)
    blocks = logits.reshape(-1, vocab // BLOCK, BLOCK)
    best, _ = _first(blocks.amax(-1), n).sort()  # in order of ids, so that indices rank among equals as ids do
    among = (best[:, :, None] * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten(1)
    return among.gather(-1, _first(logits.gather(-1, among), n))


def _first(values: Tensor, n: int) -> Tensor:
    bits = (values + 0.0).view(torch.int32)  # + 0.0 turns -0.0, whose bits would sort below 0.0, into 0.0
    monotonic = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    last = values.shape[-1] - 1
    keys = (monotonic.long() << 32) + torch.arange(last, -1, -1, device=values.device)
    return last - (keys.topk(n).values & _LOW_32)
