"""The draw: one uniform number per token picks from what temperature, top_k, top_p and min_p leave.

The number is a hash of (seed, position) alone, made on the host: the same request draws the same numbers whatever
shares its batch, whichever row it has, however its prompt was chunked, and again after a pre-emption. The token is the
inverse of the cumulative distribution at that number, over what is left in order of token ids: which tokens are left is
a question of their rank (`engine.sampling.order`), but the draw needs none, and so a GPU needs no sort.

    plain       exp ─ sums of blocks of 128 ─ find the block ─ find the token in it      reads the vocabulary once
    truncated   the 256 likeliest ─ cut ─ find the token;  where the cut lies beyond them: 4,096 likeliest, then all
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from engine.request import SamplingParams
from engine.sampling.order import likeliest
from engine.transfer import to_device

BLOCK = 128  # divides the vocabularies of Llama, Mistral, NeMo and Qwen; others are padded
CANDIDATES = 256  # nearly always contain the cut; a topk of 1,024 takes more than twice the time
WIDEN = 16  # factor to the next number of candidates
_MASK_64 = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on seed and position alone.

    SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014), its state being the
    finalised seed plus position + 1 golden-ratio steps; the upper 53 bits become the fraction.
    """
    state = (mix(seed & _MASK_64) + (position + 1) * 0x9E3779B97F4A7C15) & _MASK_64
    return (mix(state) >> 11) * 2.0**-53


def mix(value: int) -> int:
    """The finaliser of SplitMix64, on 64 bits."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def take_rows(values: Tensor, rows: list[int]) -> Tensor:
    """The named rows, ascending, of [S, V]: `values` itself where they are all of it, since its copy costs a pass."""
    if len(rows) == len(values):
        return values
    return values.index_select(0, to_device(rows, torch.int64, values.device))


def draw(logits: Tensor, peaks: Tensor, params: list[SamplingParams], uniforms: list[float]) -> Tensor:
    """One token per row.

    Args:
        logits: float32 [S, V], adjusted. A row without a finite peak gets some token; the caller knows it has failed.
        peaks: float32 [S], the largest of each row. Taken off before the division, so that nothing overflows.
        params: of each row, temperature > 0.
        uniforms: of each row, in [0, 1).

    Returns:
        int64 [S].
    """
    device, vocab = logits.device, logits.shape[-1]
    u = to_device(uniforms, torch.float64, device)
    temperatures = to_device([each.temperature for each in params], torch.float32, device)
    weights = (logits - peaks[:, None]).div_(temperatures[:, None]).exp_()
    padded = functional.pad(weights, (0, -vocab % BLOCK)) if vocab % BLOCK else weights
    blocks = padded.reshape(len(params), -1, BLOCK)
    sums = blocks.sum(-1).double().cumsum(-1)

    tokens = _draw_plain(blocks, sums, u)
    truncated = [i for i, each in enumerate(params) if each.top_k > 0 or each.top_p < 1 or each.min_p > 0]
    if truncated:
        limits = [(params[i].top_k or vocab, params[i].top_p, params[i].min_p) for i in truncated]
        where = to_device(truncated, torch.int64, device)
        tokens[where] = _draw_truncated(
            take_rows(logits, truncated),
            take_rows(weights, truncated),
            sums[where, -1:],
            to_device(limits, torch.float64, device),
            u[where],
            CANDIDATES,
        )
    return tokens


def _draw_plain(blocks: Tensor, sums: Tensor, u: Tensor) -> Tensor:
    """Invert at u in two steps: weights float32 [S, N, BLOCK], running sums of blocks float64 [S, N], u float64 [S]."""
    block, rest = _invert(sums, u)
    rows = torch.arange(len(u), device=u.device)
    inside, _ = _invert(blocks[rows, block].double().cumsum(-1), rest)
    return block * BLOCK + inside


def _draw_truncated(logits: Tensor, weights: Tensor, total: Tensor, limits: Tensor, u: Tensor, size: int) -> Tensor:
    """Draw among the `size` likeliest tokens, and again among more where the cut lies beyond them.

    Args:
        logits, weights: float32 [S, V]; the weights say how likely, the logits in which order.
        total: float64 [S, 1], sum of all weights.
        limits: float64 [S, 3], top_k, top_p and min_p.
        u: float64 [S].
    """
    vocab = weights.shape[-1]
    size = min(size, vocab)
    top_k, top_p, min_p = limits[:, 0:1], limits[:, 1:2], limits[:, 2:3]
    ids = likeliest(logits, size)
    kept = weights.gather(-1, ids).double()

    within_k = torch.arange(size, device=u.device) < top_k
    kept = kept.where(within_k, 0.0)
    before = kept.cumsum(-1) - kept
    # top_p is a share of what top_k leaves: of everything where top_k leaves everything.
    share = top_p * torch.where(top_k < vocab, kept.sum(-1, keepdim=True), total)
    kept = kept.where((top_p >= 1) | (before < share), 0.0)
    kept = kept.where(kept >= min_p * kept[:, :1], 0.0)
    ascending, order = ids.sort(-1)
    sums = kept.gather(-1, order).cumsum(-1)
    tokens = ascending.gather(-1, _invert(sums, u)[0][:, None]).flatten()

    # What top_k leaves must be known whole before top_p can cut it; then the cut must lie before the last candidate.
    whole = (top_k <= size) | ((top_k >= vocab) & (kept[:, -1:] == 0))
    if size < vocab and not bool(whole.all()):
        rest = (~whole).flatten().nonzero().flatten()
        tokens[rest] = _draw_truncated(logits[rest], weights[rest], total[rest], limits[rest], u[rest], size * WIDEN)
    return tokens


def _invert(sums: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Where u times the whole lies in running sums, never in an entry that adds nothing.

    Args:
        sums: float64 [S, N], ascending.
        u: float64 [S], in [0, 1 - 2**-53]: then u times the whole is below the whole even after rounding.

    Returns:
        The entry int64 [S], and how far into that entry float64 [S], in the range of u.
    """
    target = u[:, None] * sums[:, -1:]
    entry = torch.searchsorted(sums, target, right=True).clamp_(max=sums.shape[-1] - 1)
    above = sums.gather(-1, entry)
    below = sums.gather(-1, (entry - 1).clamp_(min=0)).where(entry > 0, 0.0)
    inside = ((target - below) / (above - below)).clamp_(max=1 - 2**-53)
    return entry.flatten(), inside.flatten()
