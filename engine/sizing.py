"""How many KV pages, and how long a context: arithmetic on EngineConfig, ModelConfig and free memory. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import EngineConfig, ModelConfig
from engine.errors import EngineConfigError
from engine.schemes import SCHEMES

DEFAULT_TOKENS_PER_SEQUENCE = 2048  # a chat of usual length, for each of max_batch_size sequences
LONGEST_CONTEXT = 131072  # what NeMo was trained for; its files claim up to 1,024,000


@dataclass(frozen=True, slots=True)
class CacheSize:
    """num_pages of page_size tokens; one sequence owns at most pages_per_sequence of them."""

    num_pages: int
    max_model_len: int
    pages_per_sequence: int


def check_config(engine: EngineConfig) -> None:
    """Raises EngineConfigError for a size that is not positive or not possible together with the others."""
    for field in ("max_batch_size", "max_batch_tokens", "page_size"):
        _require(getattr(engine, field) >= 1, field, getattr(engine, field), "must be at least 1")
    for field in ("kv_memory_bytes", "threads"):
        value = getattr(engine, field)
        _require(value is None or value >= 1, field, value, "must be at least 1")
    _require(engine.precision in SCHEMES, "precision", engine.precision, f"must be {', '.join(SCHEMES)}")
    length = engine.max_model_len
    _require(length is None or length >= 2, "max_model_len", length, "must be at least 2 (a prompt and a completion)")
    _require(
        engine.max_batch_tokens >= engine.max_batch_size,
        "max_batch_tokens",
        engine.max_batch_tokens,
        f"must be at least max_batch_size ({engine.max_batch_size}), one token for each running sequence",
    )


def size_cache(engine: EngineConfig, model: ModelConfig, dtype_bytes: int, free_bytes: int) -> CacheSize:
    """Pages and context length, as documented at `EngineConfig`.

    Args:
        free_bytes: memory left on the device once the weights are loaded.

    Raises:
        EngineConfigError: the context does not fit; the message has the numbers.
    """
    limit = min(model.max_position_embeddings, LONGEST_CONTEXT)
    wanted = engine.max_model_len
    _require(
        wanted is None or wanted <= model.max_position_embeddings,
        "max_model_len",
        wanted,
        f"must be at most the model's own limit of {model.max_position_embeddings} tokens",
    )
    page_bytes = engine.page_size * model.kv_bytes_per_token(dtype_bytes)
    if engine.kv_memory_bytes is not None:
        budget = engine.kv_memory_bytes
        _require(
            budget <= free_bytes, "kv_memory_bytes", budget, f"must be at most the {free_bytes} bytes that are free"
        )
        pages = budget // page_bytes
    else:
        tokens = max(engine.max_batch_size * DEFAULT_TOKENS_PER_SEQUENCE, wanted or 0)
        budget = free_bytes // 2
        pages = min(-(-tokens // engine.page_size), budget // page_bytes)
    holds = pages * engine.page_size
    _require(
        holds >= (wanted or 2),
        "max_model_len",
        wanted or "auto",
        f"needs {-(-(wanted or 2) // engine.page_size) * page_bytes} bytes of KV cache ({page_bytes} per page of "
        f"{engine.page_size} tokens), but {budget} bytes hold {holds} tokens",
    )
    length = wanted or min(limit, holds)
    return CacheSize(pages, length, -(-length // engine.page_size))


def _require(ok: bool, field: str, value: object, rule: str) -> None:
    if not ok:
        raise EngineConfigError(f"{field}: {value} {rule}")
