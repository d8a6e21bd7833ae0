"""How far one decoder's predictions are from another's, teacher-forced over the same text.

    tokens ──► decoder, pages, KV precision ──► hidden states ──► head ──► logits ──┐
    the reference's hidden states, kept ──────────► its head, kept ──► logits ──────┴──► KL, top-1, log-likelihood

Of a reference only hidden states and the head are kept, so that two models never need to be in memory as a whole, and
logits (tokens x vocabulary) never lie anywhere but a slab at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.quality_report import Quality
from engine.model.cache import KVCache
from engine.model.decoder import Decoder
from engine.quant import Linear
from engine.rows import Rows
from engine.step import RowWork

STEP = 512  # tokens of a forward pass, the engine's own default
_SLAB = 128  # tokens whose logits are there at a time: 24 MiB for a vocabulary of 49,152, 64 MiB for NeMo's
_PAGE = 64


@dataclass(frozen=True, slots=True)
class Scores:
    """Of one distribution against another, position by position: each [n], the last two [n - 1]: no text follows the
    last position.

    Attributes:
        kl: nats.
        same: bool.
        loss, reference_loss: negative log-likelihood of the token that followed.
    """

    kl: Tensor
    same: Tensor
    loss: Tensor
    reference_loss: Tensor


@dataclass(frozen=True, slots=True)
class Observed:
    """What is kept of a run: hidden states [len, hidden_size] of each passage, and the map to logits."""

    hidden: list[Tensor]
    head: Linear


@torch.inference_mode()
def observe(decoder: Decoder, passages: Sequence[Sequence[int]], kv_dtype: torch.dtype) -> Observed:
    """Run passages through a decoder, each as a sequence of its own over a paged cache of this dtype."""
    pages = -(-max(map(len, passages)) // _PAGE)
    cache = KVCache.allocate(decoder.config, pages, _PAGE, kv_dtype, decoder.device)
    states = []
    for token_ids in passages:
        rows = Rows(1, pages, _PAGE, decoder.device)
        parts = []
        for at in range(0, len(token_ids), STEP):
            new_pages = list(range(pages)) if at == 0 else []
            batch = rows.batch([RowWork(0, at, list(token_ids[at : at + STEP]), new_pages, False)])
            parts.append(decoder.forward(batch.token_ids, batch.attention, cache))
        states.append(torch.cat(parts))
    return Observed(states, decoder.weights.head)


@torch.inference_mode()
def compare(reference: Observed, subject: Observed, passages: Sequence[Sequence[int]]) -> list[Scores]:
    """Of each passage, from hidden states of two decoders over the same passages."""
    scores = []
    for expected, found, token_ids in zip(reference.hidden, subject.hidden, passages, strict=True):
        slabs = []
        for at in range(0, len(token_ids), _SLAB):
            rows = slice(at, at + _SLAB)
            following = torch.tensor(token_ids[at + 1 : at + _SLAB + 1], device=found.device)
            slabs.append(score(reference.head(expected[rows]), subject.head(found[rows]), following))
        scores.append(join(slabs))
    return scores


def score(reference: Tensor, logits: Tensor, following: Tensor) -> Scores:
    """From logits float32 [n, vocab] of both at the same positions; the tokens that followed are int64 [n or n - 1]."""
    wanted, found = reference.log_softmax(-1), logits.log_softmax(-1)

    def loss(log_probs: Tensor) -> Tensor:
        return -log_probs[: len(following)].gather(1, following.unsqueeze(1)).squeeze(1)

    return Scores(
        kl=(wanted.exp() * (wanted - found)).sum(-1),
        same=wanted.argmax(-1) == found.argmax(-1),
        loss=loss(found),
        reference_loss=loss(wanted),
    )


def join(scores: Sequence[Scores]) -> Scores:
    return Scores(*(torch.cat([getattr(each, field) for each in scores]) for field in Scores.__slots__))


def summarise(scores: Sequence[Scores], kinds: Sequence[str]) -> Quality:
    """Of all passages, whose kinds of text are given in the same order."""
    whole = join(scores)
    delta = whole.loss.double() - whole.reference_loss
    of_kind = {kind: join([each for each, its in zip(scores, kinds, strict=True) if its == kind]) for kind in kinds}
    return Quality(
        kl_mean=whole.kl.double().mean().item(),
        kl_p99=whole.kl.double().quantile(0.99).item(),
        top1=whole.same.double().mean().item(),
        perplexity=math.exp(whole.loss.double().mean().item()),
        increase=_increase(whole),
        increase_error=math.exp(delta.mean().item()) * delta.std().item() / len(delta) ** 0.5,
        increase_by_kind={kind: _increase(some) for kind, some in of_kind.items()},
    )


def _increase(scores: Scores) -> float:
    """Of perplexity."""
    return math.expm1((scores.loss.double() - scores.reference_loss).mean().item())
