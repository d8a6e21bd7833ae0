"""`python -m bench.soak`: thousands of requests of every kind to one engine process, and what must hold after them.

Prompts of one token to hundreds, some of which begin alike or repeat themselves; tokens greedy and drawn; logprobs,
classes, salts; on demand grammars, known, new and forgotten; a quarter of the callers goes away, some before their
first token; so few KV pages that requests are pre-empted all the time. After each round the engine is left idle and
must be as it was: every request has had exactly one terminal event, nothing runs or waits, no page is held, the
engine's own look at its books has passed (`engine.loop`: an idle engine dies of what it finds), and neither process has
grown. Otherwise the exit status is 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json as json_format
import math
import os
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec
import numpy as np
from safetensors.numpy import save_file

from bench.checkpoints import hf_config
from bench.measure import Machine, anonymous_bytes, this_machine, write_result
from bench.options import model_path
from engine.checkpoint import open_checkpoint
from engine.checkpoint.layout import expected_tensors
from engine.config import EngineConfig, ModelConfig
from engine.errors import EngineDeadError
from engine.loop import HEARTBEAT_SECONDS, StepOutput
from engine.memory import token_bytes
from engine.remote import RemoteEngine
from engine.request import EngineStats, FinishReason, Grammar, Request, SamplingParams, Vocabulary
from service.models.family import NEMO_12B

SCHEMA = 1
# How much a process may grow after the first round, in which torch, Python and malloc take the arenas that they keep:
# two more arenas of Python. If each of the 9,000 requests after it left no more than a list of 30 tokens behind, that
# would be more.
GROWTH_BYTES = 2 * 2**20
GRAMMAR_BYTES = 8 * 2**20  # compiled ones are kept, and learn: 5 MiB until request 5,000, and nothing to 7,000
IDLE_SECONDS = 2.2 * HEARTBEAT_SECONDS  # two beats: one after the last step, and one that has checked the books
OPENINGS = 8  # texts that prompts begin with
GRAMMARS = 100  # that there are of each kind: more than the engine keeps
CROWDS = ((0.7, 10**9), (0.2, 2), (0.1, 1))  # shares of a round, and how many call at a time: drafts pay where few do
TINY = msgspec.structs.replace(
    NEMO_12B,
    vocab_size=512,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    rope_theta=10000.0,
    max_position_embeddings=512,
)


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """An idle engine after so many requests; counters run from its start. `*_bytes` are anonymous memory."""

    requests: int
    requests_per_second: float  # of this round
    engine_bytes: int
    client_bytes: int
    stats: EngineStats


class Soak(msgspec.Struct, frozen=True, kw_only=True):
    """A result file. `faults` says what did not hold."""

    schema: int = SCHEMA
    started_at: str  # ISO 8601, UTC
    machine: Machine
    config: EngineConfig
    seed: int
    ended: dict[str, int]  # by FinishReason
    samples: list[Sample]
    faults: list[str]


@dataclass(slots=True)
class Patience:
    """When a caller goes away: after so many seconds or events, whichever is first."""

    seconds: float | None = None
    events: int | None = None


class Traffic:
    """Requests for an engine of so many tokens of context. The same seed makes the same ones."""

    def __init__(self, vocab_size: int, context: int, seed: int, *, grammars: bool = False) -> None:
        self._random = random.Random(seed)
        self._grammars = grammars
        self._vocab_size = vocab_size
        self._longest = context * 3 // 4
        self._most_new = context // 4
        self._openings = [self._tokens(self._longest) for _ in range(OPENINGS)]

    def request(self, number: int) -> Request:
        choice = self._random.choice
        return Request(
            request_id=str(number),
            prompt_token_ids=self._prompt(),
            sampling=SamplingParams(
                max_tokens=max(1, min(int(self._random.expovariate(2 / self._most_new)), self._most_new)),
                temperature=choice((0.0, 0.0, 0.7, 1.3)),
                top_p=choice((1.0, 0.9)),
                top_k=choice((0, 0, 20)),
                repetition_penalty=choice((1.0, 1.0, 1.2)),
                seed=choice((None, number)),
                logprobs=choice((None, None, None, 2)),
                prompt_logprobs=choice((*[None] * 9, 1)),
                grammar=choice((None, None, None, self._grammar())) if self._grammars else None,
            ),
            priority=choice((0, 0, 0, 0, -1, 1)),
            cache_salt=choice(("", "", "", "another tenant")),
        )

    def patience(self) -> Patience:
        kind = self._random.random()
        if kind < 0.1:
            return Patience(seconds=self._random.expovariate(20))
        return Patience(events=self._random.randint(1, 8)) if kind < 0.25 else Patience()

    def _prompt(self) -> list[int]:
        """Of any length, most of them short. A third begins like others, a third repeats itself."""
        length = max(1, min(int(self._random.expovariate(4 / self._longest)), self._longest - 1))
        match self._random.randrange(3):
            case 0:
                return self._random.choice(self._openings)[:length] + self._tokens(1)
            case 1:
                return (self._tokens(self._random.randint(1, 6)) * length)[:length]
            case _:
                return self._tokens(length)

    def _grammar(self) -> Grammar:
        """Half of them are one of a few."""
        count = self._random.choice((1, 2, 3, self._random.randint(1, GRAMMARS)))
        expression = Grammar(kind="regex", text=f"([a-f]{{1,3}} ?){{{count}}}")
        schema = {"type": "object", "properties": {f"p{count}": {"type": "string", "maxLength": count}}}
        listing = Grammar(kind="json_schema", text=json_format.dumps(schema | {"additionalProperties": False}))
        return self._random.choice((Grammar(kind="json_object"), expression, listing))

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(self._vocab_size) for _ in range(count)]


class WatchedEngine(RemoteEngine):
    """Sees all terminal events, also those that nobody waits for any more."""

    terminal: bytearray  # how many each request has had; their inner ids count from 1
    reasons: dict[str, int]
    errors: list[str]

    def watch(self, requests: int) -> None:
        self.terminal = bytearray(1 + requests)
        self.reasons = dict.fromkeys(FinishReason, 0)
        self.errors = []

    def _deliver(self, output: StepOutput) -> None:
        super()._deliver(output)
        for event in output.events:
            if event.finish_reason is not None:
                self.terminal[int(event.request_id)] += 1
                self.reasons[event.finish_reason] += 1
            if event.error is not None:
                self.errors.append(f"request {event.request_id}: {event.error}")


async def call(engine: WatchedEngine, request: Request, patience: Patience) -> None:
    """Send a request and read what it says, as long as the caller's patience lasts."""
    async with contextlib.aclosing(engine.generate(request)) as events:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience.seconds):
                seen = 0
                async for _ in events:
                    seen += 1
                    if seen == patience.events:
                        return


async def soak(
    config: EngineConfig, *, requests: int, every: int, callers: int, seed: int, grammars: bool = False
) -> Soak:
    """Send the requests, `callers` at a time, in rounds of `every`; print a line after each round."""
    started_at, machine = datetime.now(UTC).isoformat(timespec="seconds"), this_machine()
    engine = await WatchedEngine.start(config)
    assert isinstance(engine, WatchedEngine)
    engine.watch(requests)
    if grammars:
        engine.set_vocabulary(Vocabulary(tokens=[bytes([value]) for value in range(256)], special=[]))
    samples: list[Sample] = []
    faults: list[str] = []
    try:
        info = engine.info
        context = min(info.max_model_len, info.kv_pages * info.page_size)
        traffic = Traffic(info.vocab_size, context, seed, grammars=grammars)
        while (done := samples[-1].requests if samples else 0) < requests and not faults:
            count = min(every, requests - done)
            numbers, begin = iter(range(done + 1, done + count + 1)), time.monotonic()
            for share, crowd in CROWDS:
                part = itertools.islice(numbers, math.ceil(share * count))
                await asyncio.gather(*(_calls(engine, traffic, part) for _ in range(min(crowd, callers))))
            rate = count / (time.monotonic() - begin)
            await asyncio.sleep(IDLE_SECONDS)
            sample = Sample(
                requests=done + count,
                requests_per_second=rate,
                engine_bytes=anonymous_bytes(engine.pid),
                client_bytes=anonymous_bytes(),
                stats=engine.stats,
            )
            samples.append(sample)
            show(sample)
            faults += _faults(engine, sample, samples[0], GRAMMAR_BYTES if grammars else GROWTH_BYTES)
    except (EngineDeadError, OSError) as error:
        faults.append(str(error))
    finally:
        await engine.close()
    # Where the model lies is nobody's business.
    shown = msgspec.structs.replace(config, model_path=Path(config.model_path).name)
    return Soak(
        started_at=started_at,
        machine=machine,
        config=shown,
        seed=seed,
        ended=engine.reasons,
        samples=samples,
        faults=faults,
    )


async def _calls(engine: WatchedEngine, traffic: Traffic, numbers: Iterator[int]) -> None:
    """One caller: one request after the other, as long as there are any."""
    for number in numbers:
        await call(engine, traffic.request(number), traffic.patience())


def _faults(engine: WatchedEngine, sample: Sample, first: Sample, most_growth: int) -> Iterator[str]:
    """What does not hold of an idle engine."""
    stats = sample.stats
    if engine.failure is not None:
        yield f"the engine died: {engine.failure}"
    yield from engine.errors
    for number, count in enumerate(engine.terminal[1 : sample.requests + 1], 1):
        if count != 1:
            yield f"request {number} has had {count} terminal events"
    for name, value in (("running", stats.running), ("queued", stats.queued), ("pages held", stats.kv_pages_used)):
        if value:
            yield f"{name}: {value}, where nothing was asked for"
    growth = {
        "the engine": sample.engine_bytes - first.engine_bytes,
        "the client": sample.client_bytes - first.client_bytes,
    }
    for name, grown in growth.items():
        if grown > most_growth:
            yield f"{name} has grown by {grown} bytes since request {first.requests}, by more than {most_growth}"


def show(sample: Sample) -> None:
    stats = sample.stats
    print(
        f"{sample.requests:6} requests, {sample.requests_per_second:5.1f}/s: "
        f"engine {sample.engine_bytes / 2**20:.1f} MiB, client {sample.client_bytes / 2**20:.1f} MiB, "
        f"{stats.kv_pages_used} of {stats.kv_pages_total} pages held, {stats.prefix_cache_hit_tokens} tokens found, "
        f"{stats.accepted_draft_tokens} of {stats.draft_tokens} drafts right, {stats.preemptions} pre-emptions",
        flush=True,
    )


def write_tiny(folder: Path, model: ModelConfig = TINY, seed: int = 0) -> Path:
    """A random model without a tokenizer, large enough in its weights that logits are far from uniform."""
    rng = np.random.default_rng(seed)
    weights = {
        name: (rng.normal(0, 0.15, shape) + ("norm" in name)).astype(np.float32)
        for name, shape in expected_tensors(model).items()
    }
    (folder / "config.json").write_text(json_format.dumps(hf_config(model)))
    save_file(weights, folder / "model.safetensors")
    return folder


def soak_config(
    path: Path,
    *,
    kv_pages: int = 32,
    batch: int = 8,
    tokens: int = 64,
    page_size: int = 16,
    kv_precision: str = "auto",
    lookahead: int | None = None,
) -> EngineConfig:
    """An engine with so few pages that a few long requests hold them all."""
    with open_checkpoint(str(path)) as checkpoint:
        page_bytes = page_size * token_bytes(checkpoint.config, kv_precision, 2)
    return EngineConfig(
        model_path=str(path),
        dtype="bfloat16",
        precision="int8",
        kv_precision=kv_precision,
        max_batch_size=batch,
        max_batch_tokens=tokens,
        page_size=page_size,
        max_model_len=min(checkpoint.config.max_position_embeddings, kv_pages // 2 * page_size),
        kv_memory_bytes=kv_pages * page_bytes,
        threads=len(os.sched_getaffinity(0)),
        seed=0,
        lookahead=lookahead,
    )


@click.command(context_settings={"show_default": True})
@click.option("--model", help="a .gguf file, a folder, or a name of the catalogue; none = a tiny random one")
@click.option("--requests", type=click.IntRange(1), default=10_000, help="how many in all")
@click.option("--every", type=click.IntRange(1), default=1000, help="requests of a round")
@click.option("--callers", type=click.IntRange(1), default=24, help="requests at the same time")
@click.option("--batch", type=click.IntRange(1), default=8, help="max_batch_size of the engine")
@click.option("--batch-tokens", type=click.IntRange(1), default=64, help="max_batch_tokens of the engine")
@click.option(
    "--kv-pages", type=click.IntRange(2), default=32, help="pages of the KV cache; a request has half at most"
)
@click.option("--page-size", type=click.IntRange(1), default=16, help="tokens of a page")
@click.option("--kv-precision", default="auto", help="of the KV cache: auto, bf16 or fp8")
@click.option("--lookahead", type=click.IntRange(0, 1), help="of the engine; none = as it chooses")
@click.option("--grammars", is_flag=True, help="a quarter of the requests have one")
@click.option("--seed", default=0, help="fixes the requests; when they come and go is left to chance")
@click.option("--json", type=click.Path(path_type=Path), help="also write the result to this file")
def main(
    model: str | None,
    requests: int,
    every: int,
    callers: int,
    batch: int,
    batch_tokens: int,
    kv_pages: int,
    page_size: int,
    kv_precision: str,
    lookahead: int | None,
    grammars: bool,
    seed: int,
    json: Path | None,
) -> None:
    """Send thousands of requests of every kind to an engine, and look whether it is as it was."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny(Path(folder)) if model is None else model_path(model)
        config = soak_config(
            path,
            kv_pages=kv_pages,
            batch=batch,
            tokens=batch_tokens,
            page_size=page_size,
            kv_precision=kv_precision,
            lookahead=lookahead,
        )
        result = asyncio.run(
            soak(config, requests=requests, every=every, callers=callers, seed=seed, grammars=grammars)
        )
    if json is not None:
        write_result(json, result)
    print(", ".join(f"{count} {reason}" for reason, count in result.ended.items()))
    for fault in result.faults[:20]:
        print(f"FAULT: {fault}")
    if result.faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
