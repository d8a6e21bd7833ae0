"""The real engine on random weights: steps of decode and prefill through the Runner, requests through the EngineCore.

    RandomCheckpoint ──load_decoder──► Decoder ──► Runner, eager and with graphs ──► step times, beside the roofline
                                                   EngineCore                    ──► TTFT, tokens per second

Contexts of decode are not computed first: keys and values are random numbers in pages of the row's own, since what they
say changes no time, while zeros would let a card draw less power and run faster.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypeVar

import torch

from bench.gpu.report import CardLimits, Figure, Journal
from bench.gpu.subject import Subject, build, fill, modes, release
from bench.gpu.workload import Workload
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import EngineError
from engine.request import Request, SamplingParams
from engine.runner import Launched, Runner, greedy_row
from engine.sizing import CacheSize
from engine.step import LAST_SAMPLED, RowWork, StepPlan

WARM_STEPS = 3  # that do not count
ENOUGH_SECONDS = 3.0  # of steps for one figure
TURNS = 5  # of a short prompt
# Of the project, on an H200 with FP8 weights and FP8 keys and values.
GOALS = {
    "decode 1 x 1K": 330.0,
    "decode 64 x 1K": 12_000.0,
    "decode 256 x 1K": 24_000.0,
    "prefill 8K": 40_000.0,
    "TTFT of 1000 tokens": 30.0,
    "256 requests of 1000 + 1000": 11_400.0,
}
WARM_UP_GOAL = 10.0

Result = TypeVar("Result")


class EngineBench:
    """All figures of one precision, as far as there is time.

    Args:
        left: seconds that remain.
    """

    def __init__(
        self, work: Workload, precision: str, device: torch.device, journal: Journal, left: Callable[[], float]
    ) -> None:
        assert journal.report.limits is not None
        self._work, self._precision, self._device = work, precision, device
        self._journal, self._left = journal, left
        self._limits: CardLimits = journal.report.limits
        self._mode = "eager"

    def run(self) -> None:
        began = time.perf_counter()
        subject = build(self._work, self._precision, self._device)
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # the last weights are still being made
        loaded = time.perf_counter()
        self._tell("weights made", loaded - began, "s")
        kinds = modes(subject.config)
        made = []
        for self._mode in kinds:
            made.append(self._measure(subject, began, whole=self._mode == [*kinds][-1]))
        if len(kinds) == 1:
            self._journal.skip(f"{self._precision} with CUDA graphs", f"there are none on a {self._device.type}")
        elif made == [True, False]:  # no graphs can be recorded: what was left to them is measured without
            self._mode = "eager"
            self._measure(subject, None, whole=True)
        if self._device.type == "cuda":
            self._tell("peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")

    def _measure(self, subject: Subject, began: float | None, whole: bool) -> bool:
        """Figures of one mode. False: there is no runner of it.

        Args:
            began: when the weights were asked for; None = how long a start takes has been told.
            whole: all figures, else decode of a short context.
        """
        runner = self._attempt("warm-up", partial(self._start, subject, began))
        if runner is not None:
            fill(runner._cache)
            contexts = self._work.contexts if whole else self._work.contexts[:1]
            self._attempt("decode", partial(self._decode, runner, subject, contexts))
            if whole:
                self._attempt("prefill", partial(self._prefill, runner, subject))
                self._attempt("requests", partial(self._requests, runner, subject))
        made = runner is not None
        del runner
        release(self._device)
        return made

    def _start(self, subject: Subject, began: float | None) -> Runner:
        config = modes(subject.config)[self._mode]
        start = time.perf_counter()
        with torch.inference_mode():  # as `Runner.load` does
            runner = Runner(config, subject.decoder, subject.size)
        runner.warm_up()
        warm = time.perf_counter() - start
        if self._mode != "eager":
            self._tell("warm-up, graphs captured in it", warm, "s", goal=WARM_UP_GOAL)
        elif began is not None:
            self._tell("warm-up, kernels loaded with it", warm, "s")
            first_token(EngineCore(runner, config), self._work.prompt)
            self._tell("cold start, no file read", time.perf_counter() - began, "s")
        return runner

    def _attempt(self, what: str, work: Callable[[], Result]) -> Result | None:
        """What fails keeps nothing else from being measured; None where it did."""
        name = f"{self._precision} {self._mode} {what}"
        self._journal.begin(name)
        try:
            return work()
        except Exception as error:  # of the engine, or of the device in any way
            self._journal.fault(name, error)
            return None
        finally:
            self._journal.end()

    def _decode(self, runner: Runner, subject: Subject, contexts: tuple[int, ...]) -> None:
        for context in contexts:
            for batch in self._work.batches:
                name = f"decode {batch} x {short(context)}"
                obstacle = self._obstacle(subject.size, batch, context)
                if obstacle is not None:
                    self._journal.skip(f"{self._precision} {name}", obstacle)
                    continue
                seconds = decode_seconds(runner, batch, context, self._work.steps)
                least = subject.arithmetic.decode(batch, context).least_seconds(self._limits)
                self._tell(name, batch / seconds, "tokens/s", batch / least)

    def _prefill(self, runner: Runner, subject: Subject) -> None:
        for tokens in self._work.prefills:
            name, chunk = f"prefill {short(tokens)}", runner.info.max_batch_tokens
            obstacle = self._obstacle(subject.size, 1, tokens)
            if obstacle is not None:
                self._journal.skip(f"{self._precision} {name}", obstacle)
                continue
            turns = 1 if tokens > 2 * chunk else TURNS
            seconds = statistics.median(prefill_seconds(runner, tokens) for _ in range(turns))
            least = subject.arithmetic.prefill(tokens, chunk).least_seconds(self._limits)
            self._tell(name, tokens / seconds, "tokens/s", tokens / least)

    def _requests(self, runner: Runner, subject: Subject) -> None:
        core = EngineCore(runner, subject.config)
        prompt, new, arithmetic = self._work.prompt, self._work.new, subject.arithmetic
        chunk = core.info.max_batch_tokens
        first = statistics.median(first_token(core, prompt) for _ in range(TURNS))
        alone = arithmetic.prefill(prompt, chunk).least_seconds(self._limits)
        self._tell(f"TTFT of {prompt} tokens", 1000 * first, "ms", 1000 * alone)
        for streams in self._work.streams:
            name = f"{streams} requests of {prompt} + {new}"
            obstacle = self._obstacle(subject.size, streams, prompt + new)
            if obstacle is not None:
                self._journal.skip(f"{self._precision} {name}", obstacle)
                continue
            deadline = time.perf_counter() + self._left() / 3
            done = throughput(core, streams, prompt, new, deadline)
            step = arithmetic.decode(streams, prompt + new // 2).least_seconds(self._limits)
            whole = streams * alone + new * step
            self._tell(name, done.tokens / done.seconds, "tokens/s", streams * new / whole)
            if done.tokens < streams * new:
                said = f"cut off after {done.seconds:.0f} s with {done.tokens} of {streams * new} tokens"
                self._journal.skip(f"{self._precision} rest of {name}", said)

    def _obstacle(self, size: CacheSize, batch: int, context: int) -> str | None:
        """Why this cannot be measured."""
        page_size = EngineConfig(model_path="").page_size
        needed = batch * -(-context // page_size)
        if context > size.max_model_len:
            return f"{context} tokens are more than the {size.max_model_len} that the cache holds"
        if needed > size.num_pages:
            return f"needs {needed} pages of the KV cache, which has {size.num_pages}"
        return None if self._left() > 0 else "no time is left"

    def _tell(self, name: str, value: float, unit: str, limit: float | None = None, goal: float | None = None) -> None:
        if goal is None and self._precision == "fp8":
            goal = GOALS.get(name)
        self._journal.figure(
            Figure(part=self._precision, mode=self._mode, name=name, value=value, unit=unit, limit=limit, goal=goal)
        )


def decode_seconds(runner: Runner, batch: int, context: int, steps: int) -> float:
    """Median time from one step's result to the next, each launched before the one before it is known, as the core does
    it on a GPU. The last step has `context` tokens in each row."""
    pages, start = -(-context // runner.info.page_size), context - steps
    arrivals: list[float] = []
    flight: Launched | None = None
    began = time.perf_counter()
    for step in range(steps):
        first = step == 0
        work = [
            RowWork(
                row=row,
                start=start + step,
                token_ids=[row if first else LAST_SAMPLED],
                new_pages=list(range(row * pages, (row + 1) * pages)) if first else [],
                sample=True,
            )
            for row in range(batch)
        ]
        launched = runner.launch(StepPlan(work, admitted=[greedy_row(row) for row in range(batch)] if first else []))
        if flight is not None:
            flight.result()
            arrivals.append(time.perf_counter())
        flight = launched
        if len(arrivals) > WARM_STEPS + 2 and arrivals[-1] - began > ENOUGH_SECONDS:
            break
    assert flight is not None
    flight.result()
    arrivals.append(time.perf_counter())
    runner.run(StepPlan([], released=list(range(batch))))
    return statistics.median(later - earlier for earlier, later in pairwise(arrivals[WARM_STEPS:]))


def prefill_seconds(runner: Runner, tokens: int) -> float:
    """One prompt in chunks as large as a step may be, to its first token."""
    info = runner.info
    ids = random_prompt(tokens, info.vocab_size)
    pages = list(range(-(-tokens // info.page_size)))
    began = time.perf_counter()
    for start in range(0, tokens, info.max_batch_tokens):
        chunk = ids[start : start + info.max_batch_tokens]
        last = start + len(chunk) == tokens
        work = RowWork(row=0, start=start, token_ids=chunk, new_pages=pages if start == 0 else [], sample=last)
        runner.run(StepPlan([work], admitted=[greedy_row(0)] if start == 0 else []))
    seconds = time.perf_counter() - began
    runner.run(StepPlan([], released=[0]))
    return seconds


def first_token(core: EngineCore, prompt: int) -> float:
    """Seconds from a request's arrival at an idle engine to its first token, of one."""
    began = time.perf_counter()
    throughput(core, 1, prompt, 1, deadline=began + 60)
    return time.perf_counter() - began


@dataclass(frozen=True, slots=True)
class Served:
    """Generated tokens, and the time from the first arrival to the last of them."""

    tokens: int
    seconds: float


def throughput(core: EngineCore, streams: int, prompt: int, new: int, deadline: float) -> Served:
    """Requests that arrive together, greedy, none ends early; those that run at the deadline are cancelled.

    Raises:
        EngineError: a request failed, for which there is no figure then.
    """
    sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
    names = [f"{time.monotonic_ns()}-{stream}" for stream in range(streams)]
    prompts = [random_prompt(prompt, core.info.vocab_size) for _ in names]
    began = time.perf_counter()
    for name, ids in zip(names, prompts, strict=True):
        core.add(Request(request_id=name, prompt_token_ids=ids, sampling=sampling))
    tokens = 0
    while core.has_work and time.perf_counter() < deadline:
        for event in core.step():
            if event.error is not None:
                raise EngineError(event.error)
            tokens += len(event.token_ids)
    seconds = time.perf_counter() - began
    for name in names:
        core.cancel(name)
    while core.has_work:
        core.step()
    return Served(tokens, seconds)


def random_prompt(tokens: int, vocab_size: int) -> list[int]:
    """Never the same again, so that no cache knows it."""
    return random.choices(range(vocab_size), k=tokens)


def short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
