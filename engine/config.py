"""What a checkpoint is (`ModelConfig`) and what its owner chooses (`EngineConfig`). Frozen, torch-free, msgpack-able.

`head_dim` is a field of its own: in Mistral NeMo it is 128 while hidden_size / num_heads = 160.
Nothing is ever sized from `max_position_embeddings` alone: NeMo ships 1,024,000 there.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec


class Llama3RopeScaling(msgspec.Struct, frozen=True, kw_only=True):
    """Frequency scaling of Llama 3.1 (`rope_type: llama3`). Source: meta-llama/llama-models, `apply_scaling`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Shape and constants of one dense Llama/Mistral-family decoder.

    Attributes:
        hidden_size: width of the residual stream.
        num_heads, num_kv_heads: query heads and key/value heads; the first is a multiple of the second.
        head_dim: width of one head, independent of hidden_size / num_heads.
        intermediate_size: width of the SwiGLU hidden layer.
        rope_theta, rope_scaling: rotary embedding (rotate-half convention, whatever the file's own convention was).
        rope_freq_factors: per-frequency divisors read from a file (GGUF `rope_freqs.weight`), length head_dim / 2.
        sliding_window: attention span in tokens, None = full.
        qkv_bias: True for Qwen2.
        tie_word_embeddings: True if the LM head is the embedding matrix.
        eos_token_ids: ids that end a generation; may be empty.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    rope_scaling: Llama3RopeScaling | None = None
    rope_freq_factors: tuple[float, ...] | None = None
    sliding_window: int | None = None
    qkv_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of key/value cache that one token takes over all layers."""
        return 2 * self.num_layers * self.kv_size * dtype_bytes


class BatchLimits(NamedTuple):
    """Sequences that run at the same time, and tokens that a step computes, at most."""

    size: int
    tokens: int


# A CPU: beyond 32 sequences two cores gain nothing, and 512 tokens are about 4 decode steps of work, so that a long
# prompt cannot freeze the others. A GPU: an H100 decodes NeMo in FP8 twice as fast in 256 sequences as in 64, and is at
# its best with prompts from 2,048 tokens on, which hold up the others for 50 ms.
DEFAULT_BATCH = {"cpu": BatchLimits(32, 512), "cuda": BatchLimits(256, 2048)}


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the owner of an engine chooses. Every default has its reason beside it.

    Attributes:
        model_path: a `.gguf` or `.safetensors` file, or a directory with config.json or params.json and safetensors.
        dtype: "auto", "bfloat16" or "float32"; compute and KV-cache dtype.
        device: "auto", "cpu" or "cuda".
        precision: how weight matrices are kept: "auto" (as the file stores them), "bf16" (the compute dtype), "fp8"
            (W8A8), "fp8-weight-only", "int8" or "int4".
        kv_precision: "auto" (the compute dtype), "bf16" (the same) or "fp8" (a scale per token and head).
        max_model_len: longest prompt + completion in tokens; None = the least of the model's own limit, 131072 and what
            the KV cache holds.
        max_batch_size: sequences that run at the same time; None = see `batch_on`.
        max_batch_tokens: token budget of one step; prefill chunks fill what decodes leave; None = see `batch_on`.
        max_draft_tokens: guesses at a sequence's next tokens that one step may compute beside its last known token
            (prompt-lookup speculative decoding); how many it does compute adapts to how often they are right. 0 = none.
        page_size: tokens per KV page.
        kv_memory_bytes: size of the KV cache; None = on a GPU all that is left; on a CPU, where others live too, what
            max_batch_size sequences of 2,048 tokens need (at least one of max_model_len), at most half of what is left.
        kv_memory_share: the same as a share of what is left, above 0 and at most 1; not together with kv_memory_bytes.
        prefix_caching: pages stay known when their request has ended, and requests that begin alike share them.
        threads: intra-op CPU threads; None = all cores.
        seed: basis of the random streams of requests that bring no seed; None = a new one at each start.
        tensor_parallel_size: devices that share every matrix of the model, one process for each; on a CPU processes.
        lookahead: steps that are planned and launched before the result of the one before them is known, 0 or 1; the
            tokens are the same. None = 1 on a GPU, 0 on a CPU.
        cuda_graphs: on a GPU, steps of few tokens are recorded at the start and replayed; not among several devices.
        max_loras: LoRA adapters whose requests can run at the same time; each has a slot of device memory of its own,
            taken at the start. 0 = no adapters, no memory.
        max_cpu_loras: adapters that can be loaded, all of which stay in host memory.
        max_lora_rank: highest rank of an adapter, and what a slot is sized for.
        log_level, log_json: of the log lines that processes of the engine write to stderr; see `process.logs`.
    """

    model_path: str
    dtype: str = "auto"
    device: str = "auto"
    precision: str = "auto"
    kv_precision: str = "auto"
    max_model_len: int | None = None
    max_batch_size: int | None = None
    max_batch_tokens: int | None = None
    max_draft_tokens: int = 7  # with the known token 8 rows: the most that kernels for decoding take at once
    page_size: int = 64  # one page of one head is a contiguous 16 KiB tile at head_dim 128 in bf16
    kv_memory_bytes: int | None = None
    kv_memory_share: float | None = None
    prefix_caching: bool = True  # the tokens are the same, and a hash per page costs nothing beside computing it
    threads: int | None = None
    seed: int | None = None
    tensor_parallel_size: int = 1  # a model that fits on one device makes more tokens as several engines of one
    lookahead: int | None = None  # a GPU would wait for the host after each step; a CPU is host and device in one
    cuda_graphs: bool = True  # without them small batches wait for the launches of the host
    max_loras: int = 0
    max_cpu_loras: int = 64  # of rank 32 on every matrix of NeMo they are 14 GiB; most change fewer
    max_lora_rank: int = 32  # few adapters have more; a slot for NeMo takes 218 MiB on a GPU
    log_level: str = "info"
    log_json: bool = False

    def batch_on(self, device: str) -> BatchLimits:
        """The most of a step on "cpu" or "cuda": what was asked for, and a default that fits what was."""
        default, size, tokens = DEFAULT_BATCH[device], self.max_batch_size, self.max_batch_tokens
        return BatchLimits(
            size=size or min(default.size, tokens or default.size), tokens=tokens or max(default.tokens, size or 0)
        )

    def lookahead_on(self, device: str) -> int:
        """The lookahead on "cpu" or "cuda"."""
        return int(device == "cuda") if self.lookahead is None else self.lookahead
