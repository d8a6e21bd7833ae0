"""What the decoder is compared with: tiny random transformers models, and a way to run ours without an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from engine.config import EngineConfig, Llama3RopeScaling, ModelConfig
from engine.model.cache import KVCache
from engine.model.decoder import Decoder
from engine.model.load import load_decoder
from engine.quant.matrix import FloatMatrix
from engine.request import SamplingParams
from engine.rows import Rows
from engine.runner import load_runner
from engine.step import RowInit, RowWork, StepPlan, Targets

BASE = ModelConfig(
    architecture="llama",
    vocab_size=97,
    hidden_size=48,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,  # not hidden_size / num_heads
    intermediate_size=72,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=512,
)


@dataclass
class StateDict:
    """A checkpoint in memory."""

    config: ModelConfig
    tensors: dict[str, Tensor]

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def matrix(self, name: str, start: int = 0, stop: int | None = None) -> FloatMatrix:
        return FloatMatrix(self.read(name)[start:stop])

    def stored_bytes(self, name: str) -> int:
        return self.read(name).nbytes


def transformers_model(config: ModelConfig, seed: int = 0) -> transformers.PreTrainedModel:
    """The model of transformers with this shape and random weights, large enough that every part matters."""
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    shape = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_parameters": rope,
        "attn_implementation": "eager",
    }
    if config.architecture == "qwen2":
        hf: transformers.PretrainedConfig = transformers.Qwen2Config(**shape)
    elif config.sliding_window is not None:
        hf = transformers.MistralConfig(**shape, sliding_window=config.sliding_window)
    else:
        hf = transformers.LlamaConfig(**shape)
    model = transformers.AutoModelForCausalLM.from_config(hf, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
            if parameter.ndim == 1:
                parameter.add_(1.0)
    return model


def decoder_of(
    config: ModelConfig, model: transformers.PreTrainedModel, dtype: torch.dtype = torch.float32, max_len: int = 512
) -> Decoder:
    """Our decoder with the weights of a transformers model."""
    source = StateDict(config, model.state_dict())
    return load_decoder(source, dtype, torch.device("cpu"), max_len, torch.get_num_threads(), lambda phase, done: None)


@torch.inference_mode()
def teacher_forced(
    decoder: Decoder,
    sequences: Sequence[list[int]],
    chunk: int = 512,
    page_size: int = 16,
    kv_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Logits [len, vocab] after every token of each sequence, computed side by side, `chunk` tokens of each a step.

    Args:
        kv_dtype: of keys and values; None = the decoder's.
    """
    pages = [-(-len(tokens) // page_size) for tokens in sequences]
    cache = KVCache.allocate(decoder.config, sum(pages), page_size, kv_dtype or decoder.dtype, decoder.device)
    order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(0)).tolist()
    rows = Rows(len(sequences), max(pages), page_size, decoder.device)
    tables = [[order.pop() for _ in range(n)] for n in pages]
    outputs: list[list[Tensor]] = [[] for _ in sequences]
    for start in range(0, max(map(len, sequences)), chunk):
        work = [
            RowWork(row, start, tokens[start : start + chunk], tables[row] if start == 0 else [], False)
            for row, tokens in enumerate(sequences)
            if start < len(tokens)
        ]
        batch = rows.batch(work)
        hidden = decoder.forward(batch.token_ids, batch.attention, cache)
        logits = decoder.logits(hidden, torch.arange(len(hidden)))
        for item, part in zip(work, logits.split([len(item.token_ids) for item in work]), strict=True):
            outputs[item.row].append(part)
    return [torch.cat(parts) for parts in outputs]


def from_transformers(config: Mapping[str, Any], weights: dict[str, Tensor]) -> transformers.PreTrainedModel:
    """The float32 model of transformers with a config.json and tensors by its names."""
    hf = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(hf, dtype=torch.float32, attn_implementation="eager")
    model.load_state_dict(weights)
    return model.eval()


def engine_logprobs(path: Path, prompt: list[int], precision: str = "auto") -> Tensor:
    """What a whole engine, loaded from files, says of a prompt: float32 [len - 1, vocab], the token after each."""
    config = EngineConfig(model_path=str(path), dtype="float32", precision=precision, threads=1, max_model_len=256)
    runner = load_runner(config, lambda phase, done: None)
    targets = Targets(1, prompt[1:], top=runner.info.vocab_size)
    pages = -(-len(prompt) // runner.info.page_size)
    work = RowWork(0, 0, prompt, list(range(pages)), sample=True, targets=targets)
    result = runner.run(StepPlan(work=[work], admitted=[RowInit(0, SamplingParams(), 0, prompt, [])]))
    logprobs = torch.empty(len(prompt) - 1, runner.info.vocab_size)
    for row, each in zip(logprobs, result.targets[0], strict=True):
        tokens, values = zip(*each.top, strict=True)
        row[list(tokens)] = torch.tensor(values)
    return logprobs


LLAMA3_SCALING = Llama3RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
