"""Ways of scheduling the same requests, for tests that expect the same tokens of all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.request import FinishReason, Request
from engine.runner import Runner


@dataclass(frozen=True)
class Way:
    """One way of scheduling. Of three arrivals each has another class, if there are `classes`; `gap` steps pass between
    them; `pages` None = as many as are needed; it `shares` a page at least once, where it says so; `drafts` at most,
    wherever something can be guessed."""

    batch: int = 4
    budget: int = 512
    page_size: int = 16
    pages: int | None = None
    gap: int = 0
    backwards: bool = False
    preempts: bool = False
    classes: bool = False
    caching: bool = True
    shares: bool = True
    drafts: int = 0
    lookahead: int = 0


UNSHARED = Way(caching=False, shares=False)


def tokens_of(runner: Runner, config: EngineConfig, requests: list[Request], way: Way) -> dict[str, list[int]]:
    """Run the requests to their ends, step by step; every one must end by its max_tokens."""
    core = EngineCore(runner, config, clock=lambda: 0.0)
    arrivals = list(reversed(requests)) if way.backwards else list(requests)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    ended = 0
    step = 0
    while ended < len(requests):
        while arrivals and step >= way.gap * (len(requests) - len(arrivals)):
            request = arrivals.pop(0)
            core.add(replace(request, priority=-(len(arrivals) % 3)) if way.classes else request)
        for event in core.step():
            tokens[event.request_id] += event.token_ids
            if event.finish_reason is not None:
                assert event.finish_reason is FinishReason.LENGTH
                ended += 1
        step += 1
    stats = core.stats()
    assert (stats.kv_pages_used, stats.running, stats.queued) == (0, 0, 0)
    assert (stats.preemptions > 0) == way.preempts
    assert (stats.prefix_cache_hit_tokens > 0) == way.shares
    core.check()
    assert (stats.accepted_draft_tokens > 0) == (way.drafts > 0)
    assert (stats.draft_tokens > stats.accepted_draft_tokens) == (way.drafts > 0)
    return tokens


def config_for(
    path: Path, way: Way, kv_bytes_per_token: int, max_model_len: int, kv: str = "auto", dtype: str = "float32"
) -> EngineConfig:
    pages = way.pages or way.batch * -(-max_model_len // way.page_size)
    return EngineConfig(
        model_path=str(path),
        dtype=dtype,
        max_model_len=min(max_model_len, pages * way.page_size),
        max_batch_size=way.batch,
        max_batch_tokens=way.budget,
        page_size=way.page_size,
        kv_precision=kv,
        kv_memory_bytes=pages * way.page_size * kv_bytes_per_token,
        threads=1,
        prefix_caching=way.caching,
        max_draft_tokens=way.drafts,
        lookahead=way.lookahead,
    )
