"""`transformers` with the same weights at its best: one batch of equally long prompts through `generate`, sdpa, greedy.

Static batching is all that `generate` has: every stream gets its token at the same moment, and the batch is full from
the first step to the last, which is the best case for it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from bench.measure import Job, PeerReport, Run, peak_rss_bytes, summarise


class Arrivals(BaseStreamer):
    """Notes when `generate` hands over the tokens of a step. The first call brings the prompts."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompts_seen = False

    def put(self, value: Any) -> None:
        if self._prompts_seen:
            self.times.append(time.perf_counter())
        self._prompts_seen = True

    def end(self) -> None:
        pass


def measure(job: Job) -> PeerReport:
    """Load the model, then run every number of streams after a short warm-up of the same shape."""
    torch.set_num_threads(job.threads)
    device = job.device if job.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    began = time.perf_counter()
    model = load(Path(job.model), job.dtype, device)
    load_seconds = time.perf_counter() - began
    runs = []
    for streams in job.streams:
        print(f"  transformers, {streams} streams", file=sys.stderr, flush=True)
        warm_up = msgspec.structs.replace(job, new_tokens=min(4, job.new_tokens), seed=-1 - job.seed)
        run(model, warm_up, streams)
        runs.append(run(model, job, streams))
    return PeerReport(
        peer="transformers",
        version=transformers.__version__,
        dtype=str(model.dtype).removeprefix("torch."),
        device=device,
        weight_bytes=sum(weight.numel() * weight.element_size() for weight in model.parameters()),
        load_seconds=load_seconds,
        peak_rss_bytes=peak_rss_bytes(),
        runs=runs,
    )


def load(path: Path, dtype: str, device: str) -> Any:
    """The model in evaluation mode. bfloat16 where nothing else is asked for: half of the bytes to read per step."""
    where = {"gguf_file": path.name} if path.is_file() else {}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent if path.is_file() else path,
        dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
        attn_implementation="sdpa",
        local_files_only=True,
        **where,
    )
    return model.to(device).eval()


@torch.inference_mode()
def run(model: Any, job: Job, streams: int) -> Run:
    """Generate exactly `new_tokens` for each prompt, end-of-sequence or not."""
    arrivals = Arrivals()
    submitted = time.perf_counter()
    prompts = torch.tensor(job.prompts(streams, model.config.vocab_size), device=model.device)
    output = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=job.new_tokens,
        min_new_tokens=job.new_tokens,
        pad_token_id=0,
        streamer=arrivals,
    )
    first_tokens = output[:, job.prompt_tokens].tolist()
    if len(arrivals.times) != job.new_tokens:
        raise RuntimeError(f"{len(arrivals.times)} steps instead of {job.new_tokens}")
    return summarise([submitted] * streams, [arrivals.times] * streams, first_tokens)


def main() -> None:
    """Job as JSON on standard input, PeerReport as JSON on standard output."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    sys.stdout.buffer.write(msgspec.json.encode(measure(job)))


if __name__ == "__main__":
    main()
