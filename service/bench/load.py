"""Requests to a server at a number at once or at a rate, and what they add up to."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import msgspec

from service.bench.clients import Answer, Ask, Client

PERCENTS = (50, 90, 99)
WORDS = (
    *("the", "a", "of", "to", "in", "is", "it", "on", "and", "for", "with", "as", "was", "at", "by", "from"),
    *("or", "an", "be", "this", "that", "which", "have", "not", "are", "one"),
)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for.

    Attributes:
        concurrency: requests at once; with a rate the most that there may be.
        rate: requests per second, at times as random as those of people (Poisson); None: the next as one ends.
        prompt_words: of each prompt, every one another; the server says how many tokens that is.
        seed: of prompts and times.
    """

    requests: int
    concurrency: int
    rate: float | None = None
    prompt_words: int = 128
    new_tokens: int = 128
    ignore_eos: bool = True
    temperature: float = 0.0
    seed: int = 0

    def asks(self) -> list[Ask]:
        rng = random.Random(self.seed)
        return [
            Ask(
                prompt=" ".join([f"{rng.randrange(10**6)}", *rng.choices(WORDS, k=self.prompt_words - 1)]),
                new_tokens=self.new_tokens,
                ignore_eos=self.ignore_eos,
                temperature=self.temperature,
            )
            for _ in range(self.requests)
        ]


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Of many values: their mean and percentiles, all 0 if there are none."""

    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            return cls()
        p50, p90, p99 = (percentile(values, percent) for percent in PERCENTS)
        return cls(mean=sum(values) / len(values), p50=p50, p90=p90, p99=p99)


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What came.

    Attributes:
        seconds: from the first request to the last answer.
        failed: requests that did not end well, by what the server said. They count in nothing else.
        ttft: seconds from a request to its first text. itl: between two messages of an answer. tpot: from its first
            message to its last, per token after the first. latency: from a request to its end.
    """

    server: str
    plan: Plan
    seconds: float
    completed: int
    failed: dict[str, int]
    prompt_tokens: int
    new_tokens: int
    requests_per_second: float
    new_tokens_per_second: float
    total_tokens_per_second: float
    ttft_seconds: Spread
    itl_seconds: Spread
    tpot_seconds: Spread
    latency_seconds: Spread
    ttfts: list[float]
    itls: list[float]


async def measure(client: Client, plan: Plan, told: Callable[[int], None] = lambda ended: None) -> Measured:
    """Send one request to warm up, then all of the plan.

    Args:
        told: is called with the number of requests that have ended.
    """
    asks = plan.asks()
    await client.ask(asks[0])
    free, rng = asyncio.Semaphore(plan.concurrency), random.Random(plan.seed)
    answers: list[Answer] = []

    async def one(ask: Ask, due: float | None) -> None:
        async with free:
            answer = await client.ask(ask)
        if due is not None:
            answer.submitted = due  # who had to wait for a free place has waited
        answers.append(answer)
        told(len(answers))

    began = due = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for ask in asks:
            if plan.rate is None:
                group.create_task(one(ask, None))
                continue
            due += rng.expovariate(plan.rate)
            await asyncio.sleep(due - time.monotonic())
            group.create_task(one(ask, due))
    return summarise(client.name, plan, answers, time.monotonic() - began)


def summarise(server: str, plan: Plan, answers: Sequence[Answer], seconds: float) -> Measured:
    good = [answer for answer in answers if answer.error is None and answer.arrivals]
    failed = Counter(answer.error or "no text came" for answer in answers if answer.error or not answer.arrivals)
    prompt_tokens = sum(answer.prompt_tokens for answer in good)
    new_tokens = sum(answer.new_tokens for answer in good)
    ttfts = [answer.arrivals[0] - answer.submitted for answer in good]
    itls = [later - earlier for answer in good for earlier, later in pairwise(answer.arrivals)]
    tpots = [
        (answer.arrivals[-1] - answer.arrivals[0]) / (answer.new_tokens - 1) for answer in good if answer.new_tokens > 1
    ]
    return Measured(
        server=server,
        plan=plan,
        seconds=seconds,
        completed=len(good),
        failed=dict(failed),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        requests_per_second=len(good) / seconds,
        new_tokens_per_second=new_tokens / seconds,
        total_tokens_per_second=(prompt_tokens + new_tokens) / seconds,
        ttft_seconds=Spread.of(ttfts),
        itl_seconds=Spread.of(itls),
        tpot_seconds=Spread.of(tpots),
        latency_seconds=Spread.of([answer.arrivals[-1] - answer.submitted for answer in good]),
        ttfts=sorted(ttfts),
        itls=sorted(itls),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks (numpy's default)."""
    ordered = sorted(values)
    rank = percent / 100 * (len(ordered) - 1)
    low, high = math.floor(rank), math.ceil(rank)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)
