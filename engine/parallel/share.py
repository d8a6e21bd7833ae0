"""What one of several ranks has of a model. Pure and torch-free: the memory plan asks too.

    matrix                  divided along            so that
    q, k, v, gate, up       outputs: heads, width    each rank computes its own heads and inner width
    o, down                 inputs: the same         the sum over all ranks is the product
    embedding, head         outputs: vocabulary      tied or not, they are divided alike

The embedding could be whole everywhere and save one of 2 * layers + 1 sums of a step; of NeMo it would take 1.3 GB on
each device. Where there are fewer key-value heads than ranks, neighbours have the same one.

A share is a model with fewer heads, less width and a smaller vocabulary: whatever sizes or reads one needs to know no
more.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from engine.config import ModelConfig
from engine.errors import EngineConfigError


class Piece(NamedTuple):
    """Outputs and inputs of a matrix that a rank has."""

    rows: range
    columns: range


def share_of(model: ModelConfig, size: int, rank: int = 0) -> ModelConfig:
    """The part of a model that rank `rank` of `size` has; rank 0's is the largest.

    Raises:
        EngineConfigError: heads or width cannot be divided so.
    """
    if size == 1:
        return model
    _check(model, size)
    return msgspec.structs.replace(
        model,
        num_heads=model.num_heads // size,
        num_kv_heads=max(1, model.num_kv_heads // size),
        intermediate_size=model.intermediate_size // size,
        vocab_size=len(vocabulary(model.vocab_size, size, rank)),
    )


def piece_of(name: str, model: ModelConfig, size: int, rank: int) -> Piece | None:
    """What a rank has of a matrix, or of a bias (whose columns mean nothing); None = all of it.

    Args:
        name: as in checkpoints, model.layers.0.self_attn.q_proj.weight.
        model: the whole of it.
    """
    share = share_of(model, size, rank)
    hidden = range(model.hidden_size)
    heads = _stretch(share.q_size, rank)
    keys = _stretch(share.kv_size, rank * model.num_kv_heads // size if size > model.num_kv_heads else rank)
    width = _stretch(share.intermediate_size, rank)
    match name.split(".")[-2]:
        case "q_proj":
            return Piece(heads, hidden)
        case "k_proj" | "v_proj":
            return Piece(keys, hidden)
        case "gate_proj" | "up_proj":
            return Piece(width, hidden)
        case "o_proj":
            return Piece(hidden, heads)
        case "down_proj":
            return Piece(hidden, width)
        case "embed_tokens" | "lm_head":
            return Piece(vocabulary(model.vocab_size, size, rank), hidden)
    return None


def vocabulary(vocab_size: int, size: int, rank: int) -> range:
    """Token ids of a rank. Fine-tuned models have odd vocabularies: the first ranks take one more."""
    each, more = divmod(vocab_size, size)
    start = rank * each + min(rank, more)
    return range(start, start + each + (rank < more))


def _stretch(count: int, index: int) -> range:
    return range(index * count, (index + 1) * count)


def _check(model: ModelConfig, size: int) -> None:
    if not _divides(model, size):
        others = [str(each) for each in range(2, model.num_heads + 1) if _divides(model, each)]
        raise EngineConfigError(
            f"tensor_parallel_size: {size} must divide the model's {model.num_heads} attention heads and its MLP's "
            f"width of {model.intermediate_size}, and must divide its {model.num_kv_heads} key-value heads or be a "
            f"multiple of them; possible are {', '.join(['1', *others])}"
        )


def _divides(model: ModelConfig, size: int) -> bool:
    whole_heads = model.num_heads % size == 0 and model.intermediate_size % size == 0
    return whole_heads and (model.num_kv_heads % size == 0 or size % model.num_kv_heads == 0)
