"""`transformers` with its continuous batching on the same shape, in bfloat16, if it is there: the peer on this card."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from bench.gpu.engine import random_prompt
from bench.gpu.report import Figure, Journal, last_line
from bench.gpu.workload import Workload
from engine.config import ModelConfig

PART = "transformers"
STREAMS = 8, 64
NEW_TOKENS = 100  # enough to see its rate; of all 1,000 the time is not there


def measure_baseline(work: Workload, device: torch.device, journal: Journal, left: Callable[[], float]) -> None:
    """Tokens per second of requests that arrive together. What it cannot do is a line, and no fault of ours."""
    if find_spec("transformers") is None:
        journal.skip(PART, "not installed")
        return
    try:
        model = build(work.model, device)
        for streams in STREAMS:
            new = min(NEW_TOKENS, work.new)
            if left() <= 0:
                journal.skip(f"{PART} {streams} requests", "no time is left")
                continue
            rate = tokens_per_second(model, streams, work.prompt, new)
            name = f"{streams} requests of {work.prompt} + {new}"
            journal.figure(Figure(part=PART, mode="its own", name=name, value=rate, unit="tokens/s"))
    except Exception as error:  # of another engine, in any version
        journal.skip(PART, last_line(error))


def build(config: ModelConfig, device: torch.device) -> Any:
    """Random weights on the device."""
    import transformers  # takes seconds, and is not everywhere

    shape = transformers.MistralConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        sliding_window=None,
        eos_token_id=None,
        bos_token_id=None,
    )
    with device:
        model: Any = transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            shape, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return model.eval()


def tokens_per_second(model: Any, streams: int, prompt: int, new: int) -> float:
    """From the moment its first request runs to the end of the last: the start of its batching does not count."""
    import transformers  # is there: the model comes from it

    prompts = [random_prompt(prompt, model.config.vocab_size) for _ in range(streams)]
    config: Any = transformers.GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    done = model.generate_batch(inputs=prompts, generation_config=config).values()
    tokens = sum(len(each.generated_tokens) for each in done)
    if tokens != streams * new:
        raise RuntimeError(f"transformers gave {tokens} of {streams * new} tokens")
    began, ended = zip(*(each.lifespan for each in done), strict=True)
    return float(tokens / (max(ended) - min(began)))
