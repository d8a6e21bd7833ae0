"""This project's engine as its users meet it: the core in a process of its own, events over the socket pair."""

from __future__ import annotations

import asyncio
import sys
import time

import msgspec

from bench.measure import Job, PeerReport, Run, peak_rss_bytes, summarise
from engine.config import EngineConfig
from engine.remote import RemoteEngine
from engine.request import FinishReason, Request, SamplingParams


async def measure(job: Job) -> PeerReport:
    """Load the model, then run every number of streams after a short warm-up of the same shape."""
    config = EngineConfig(
        model_path=job.model,
        dtype=job.dtype,
        device=job.device,
        threads=job.threads,
        max_model_len=job.prompt_tokens + job.new_tokens,
        max_batch_size=max(job.streams),
        max_draft_tokens=0,  # greedy texts of random prompts end in loops, which nobody would ask for
    )
    began = time.perf_counter()
    engine = await RemoteEngine.start(config)
    load_seconds = time.perf_counter() - began
    try:
        runs = []
        for streams in job.streams:
            print(f"  nemoserve, {streams} streams", file=sys.stderr, flush=True)
            warm_up = msgspec.structs.replace(job, new_tokens=min(4, job.new_tokens), seed=-1 - job.seed)
            await _run(engine, warm_up, streams)
            runs.append(await _run(engine, job, streams))
        return PeerReport(
            peer="nemoserve",
            version="this checkout",
            dtype=engine.info.dtype,
            device=engine.info.device,
            weight_bytes=engine.info.weight_bytes,
            load_seconds=load_seconds,
            peak_rss_bytes=peak_rss_bytes(engine.pid),
            runs=runs,
        )
    finally:
        await engine.close()


async def _run(engine: RemoteEngine, job: Job, streams: int) -> Run:
    sampling = SamplingParams(max_tokens=job.new_tokens, temperature=0.0, ignore_eos=True)
    requests = [
        Request(request_id=f"{job.seed}/{streams}/{index}", prompt_token_ids=prompt, sampling=sampling)
        for index, prompt in enumerate(job.prompts(streams, engine.info.vocab_size))
    ]
    before = engine.stats
    measured = await asyncio.gather(*(_stream(engine, request) for request in requests))
    submitted, arrivals, first_tokens = zip(*measured, strict=True)
    after = engine.stats
    step_seconds = after.step_seconds - before.step_seconds
    return msgspec.structs.replace(
        summarise(submitted, arrivals, first_tokens),
        steps=after.steps - before.steps,
        step_seconds=step_seconds,
        host_seconds=step_seconds - (after.model_seconds - before.model_seconds),
    )


async def _stream(engine: RemoteEngine, request: Request) -> tuple[float, list[float], int]:
    """When the request was submitted, when each token came, and the first token."""
    submitted, arrivals, tokens = time.perf_counter(), [], []
    async for event in engine.generate(request):
        tokens += event.token_ids
        arrivals += [time.perf_counter()] * len(event.token_ids)
        if event.finish_reason is not None and event.finish_reason is not FinishReason.LENGTH:
            raise RuntimeError(f"a request ended by {event.finish_reason}: {event.error}")
    return submitted, arrivals, tokens[0]


def main() -> None:
    """Job as JSON on standard input, PeerReport as JSON on standard output."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    sys.stdout.buffer.write(msgspec.json.encode(asyncio.run(measure(job))))


if __name__ == "__main__":
    main()
