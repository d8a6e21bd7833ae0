"""How many KV pages, and how long a context: what an EngineConfig asks for, out of what a MemoryPlan leaves. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import EngineConfig, ModelConfig
from engine.errors import EngineConfigError
from engine.memory import MemoryPlan, context_limit
from engine.schemes import KV_PRECISIONS, SCHEMES

DEFAULT_TOKENS_PER_SEQUENCE = 2048  # a chat of usual length, for each of max_batch_size sequences


@dataclass(frozen=True, slots=True)
class CacheSize:
    """num_pages of page_size tokens; one sequence owns at most pages_per_sequence of them."""

    num_pages: int
    max_model_len: int
    pages_per_sequence: int


def check_config(engine: EngineConfig) -> None:
    """Raises EngineConfigError for a size that is not positive or not possible together with the others."""
    for field in ("page_size", "tensor_parallel_size", "max_cpu_loras", "max_lora_rank"):
        _require(getattr(engine, field) >= 1, field, getattr(engine, field), "must be at least 1")
    _require(engine.max_loras >= 0, "max_loras", engine.max_loras, "must be 0 (no adapters) or positive")
    _require(
        engine.max_loras == 0 or engine.tensor_parallel_size == 1,
        "max_loras",
        engine.max_loras,
        f"must be 0 with a tensor_parallel_size of {engine.tensor_parallel_size}: adapters are served by one device",
    )
    _require(engine.max_draft_tokens >= 0, "max_draft_tokens", engine.max_draft_tokens, "must be 0 (none) or positive")
    _require(engine.lookahead in (None, 0, 1), "lookahead", engine.lookahead, "must be 0 or 1")
    for field in ("max_batch_size", "max_batch_tokens", "kv_memory_bytes", "threads"):
        value = getattr(engine, field)
        _require(value is None or value >= 1, field, value, "must be at least 1")
    share = engine.kv_memory_share
    _require(share is None or 0 < share <= 1, "kv_memory_share", share, "must be above 0 and at most 1")
    _require(
        share is None or engine.kv_memory_bytes is None,
        "kv_memory_share",
        share,
        f"does not go with kv_memory_bytes, which is {engine.kv_memory_bytes}",
    )
    _require(engine.precision in SCHEMES, "precision", engine.precision, f"must be {', '.join(SCHEMES)}")
    kv = engine.kv_precision
    _require(kv in KV_PRECISIONS, "kv_precision", kv, f"must be {', '.join(KV_PRECISIONS)}")
    length = engine.max_model_len
    _require(length is None or length >= 2, "max_model_len", length, "must be at least 2 (a prompt and a completion)")
    size, tokens = engine.max_batch_size, engine.max_batch_tokens
    _require(
        size is None or tokens is None or tokens >= size,
        "max_batch_tokens",
        tokens,
        f"must be at least max_batch_size ({size}), one token for each running sequence",
    )


def size_cache(engine: EngineConfig, model: ModelConfig, plan: MemoryPlan, device: str) -> CacheSize:
    """Pages and context length, as documented at `EngineConfig`.

    Args:
        device: "cpu" or "cuda".

    Raises:
        EngineConfigError: the weights or the context do not fit; the message has the numbers.
    """
    wanted = engine.max_model_len
    _require(
        wanted is None or wanted <= model.max_position_embeddings,
        "max_model_len",
        wanted,
        f"must be at most the model's own limit of {model.max_position_embeddings} tokens",
    )
    others = plan.tables + plan.adapters + plan.workspace + plan.reserve
    _require(
        not plan.missing,
        "precision",
        engine.precision,
        f"takes {_gib(plan.weights)} of weights and {_gib(others)} to compute with, but {_gib(plan.free)} are free on "
        f"this {device}",
    )
    page_bytes = plan.page_size * plan.token_bytes
    budget = cache_budget(engine, plan, device)
    _require(
        budget <= plan.cache,
        "kv_memory_bytes",
        budget,
        f"must be at most the {plan.cache} bytes ({_gib(plan.cache)}) that are left",
    )
    pages = budget // page_bytes
    if device == "cpu" and engine.kv_memory_bytes is None and engine.kv_memory_share is None:
        tokens = max(engine.batch_on(device).size * DEFAULT_TOKENS_PER_SEQUENCE, wanted or 0)
        pages = min(-(-tokens // plan.page_size), pages)
    holds, needed = pages * plan.page_size, -(-(wanted or 2) // plan.page_size) * page_bytes
    _require(
        holds >= (wanted or 2),
        "max_model_len",
        wanted or "auto",
        f"needs {_gib(needed)} of KV cache ({_gib(page_bytes)} per page of {plan.page_size} tokens), but "
        f"{_gib(budget)} hold {holds} tokens",
    )
    length = wanted or min(context_limit(model), holds)
    return CacheSize(pages, length, -(-length // plan.page_size))


def cache_budget(engine: EngineConfig, plan: MemoryPlan, device: str) -> int:
    """Bytes that the KV cache may take at most. `kv_memory_bytes` is taken at its word, whatever is left."""
    if engine.kv_memory_bytes is not None:
        return engine.kv_memory_bytes
    if engine.kv_memory_share is not None:
        return int(plan.cache * engine.kv_memory_share)
    return plan.cache // 2 if device == "cpu" else plan.cache


def _gib(count: int) -> str:
    """Bytes as people read them."""
    if count < 2**20:
        return f"{count} bytes"
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"


def _require(ok: bool, field: str, value: object, rule: str) -> None:
    if not ok:
        raise EngineConfigError(f"{field}: {value} {rule}")
