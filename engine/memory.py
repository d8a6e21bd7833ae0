"""Where the memory of a device goes: arithmetic on sizes alone, the same for what the engine allocates and for what
`nemoserve doctor` says of a machine that is not there. Pure and torch-free.

    free ─┬─ weights     matrices as the precision keeps them, norms in the compute dtype
          ├─ tables      rotary angles of every position, block tables of every row
          ├─ adapters    slots of LoRA adapters
          ├─ workspace   activations and logits of the largest step
          ├─ reserve     what is taken without asking: loaded kernels, captured graphs, the allocator's rounding
          └─ cache       KV pages: all that is left
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from engine.adapters import slot_size
from engine.config import EngineConfig, ModelConfig
from engine.limits import (
    CHOICE_CHUNK,
    DECODE_SLAB,
    LOGITS_SLAB,
    PLAIN_PAGES,
    PLAIN_PAGES_FROM,
    SCORE_SLAB,
    SPLIT_ROWS,
    WORKSPACE,
)
from engine.schemes import SCHEMES, Kept, Scheme

LONGEST_CONTEXT = 131072  # what NeMo was trained for; its files claim up to 1,024,000

MIB = 2**20
# Of a CUDA process before its first tensor: driver, libraries, kernels. 450 to 600 MiB for torch 2 on A100 and H100.
CUDA_CONTEXT = 600 * MIB
# cuBLAS workspaces, kernels that load on first use and captured graphs, and what rounding of blocks wastes, in parts of
# the free memory: vLLM leaves 8 % for all of this and the context together. Graphs share one pool of
# what the largest of them computes with, which for NeMo is 140 KB a row, 140 MiB at 1,024, and up to 64 MiB of parts of
# attention. If CUDA keeps 4 KiB of each launch, the 91 graphs of 256 rows and contexts of 131,072 take 142 MiB. With
# NeMo in FP8 and 43 graphs an H100 had 3.7 GiB left of its 4.4 (measured).
CUDA_RESERVE, CUDA_RESERVE_SHARE = 512 * MIB, 0.05
CPU_RESERVE = 256 * MIB  # interpreter, libraries and tokenizer of both processes, beyond the pages that they share

# Measured with every tensor of a step counted (tests/engine/test_memory.py).
_DRAW_BYTES = 81  # per logit, where the cut of top_p lies beyond the likeliest 4,096: all are sorted, in float64
_PLAIN_MLP_BYTES = 22  # per token and inner width in plain torch
_PLAIN_W8A8_BYTES = 26  # the same where its inputs are rounded
_SCORE_BYTES = 8  # per score of attention in plain torch: it and its weight
_MASK_BYTES = 17  # per query and key of it: how far apart they are, twice, and whether that is seen
_GATHERED_BYTES = 13  # per number of a context: the key in float32, the value as stored, in float32, and in order
# Per logit beside it, with Triton: to choose, a copy of it and its id, where the token may be left, and the largest of
# each block; for logprobs a copy of it, its exponential, and whether it is larger than the chosen one.
_CHOICE_BYTES = 9
_TARGET_BYTES = 9  # per logit of a prompt's tokens: it, its exponential, and whether it is larger
# Per weight decoded in plain torch: codes, numbers, products, the result; scales and minima too where groups are small.
_DECODE_BYTES = {Kept.STORED: 22, Kept.INT4: 22, Kept.INT6: 22, Kept.INT8: 22, Kept.FP8: 13}


class Matrix(NamedTuple):
    """One weight matrix of a model, under Hugging Face's name."""

    name: str
    outputs: int
    inputs: int


MatrixBytes = Callable[[Matrix, Kept], int]
"""Bytes that a matrix takes in memory if it is to be kept so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What there is to plan with.

    Attributes:
        kind: "cpu" or "cuda".
        free: bytes that nobody has taken; on a GPU after the context was made.
        float_bytes: of the compute dtype.
        plain: plain torch computes, on a GPU without Triton or too old for it, and on a CPU without a compiler: coded
            weights become floats slab by slab before they are multiplied, and attention gathers the keys and values of
            a sequence as float32.
    """

    kind: str
    free: int
    float_bytes: int = 2
    plain: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes of each part, as drawn above. `cache` is 0 where nothing is left, and `missing` what even the rest lacks.

    Attributes:
        token_bytes: of one token in the KV cache, all layers.
        page_size: tokens of a page.
    """

    free: int
    weights: int
    tables: int
    adapters: int = 0
    workspace: int
    reserve: int
    cache: int
    missing: int
    token_bytes: int
    page_size: int

    @property
    def pages(self) -> int:
        return self.cache // (self.page_size * self.token_bytes)

    @property
    def tokens(self) -> int:
        """That fit into the cache, of all sequences together."""
        return self.pages * self.page_size


def plan_memory(model: ModelConfig, engine: EngineConfig, device: Device, weights: int | None = None) -> MemoryPlan:
    """Divide the free memory of a device.

    Args:
        model: what this device has of it (`engine.parallel.share`).
        weights: bytes of all weights, where the file was looked at; None = what engine.precision makes of a
            checkpoint in the compute dtype.
    """
    scheme = SCHEMES[engine.precision]
    if weights is None:
        weights = weight_bytes(model, scheme, device.float_bytes)
    reserve = CPU_RESERVE
    if device.kind == "cuda":
        reserve = CUDA_RESERVE + int(device.free * CUDA_RESERVE_SHARE)
    tables = table_bytes(model, engine, device)
    adapters = adapter_bytes(model, engine, device)
    workspace = step_bytes(model, engine, device)
    left = device.free - weights - tables - adapters - workspace - reserve
    return MemoryPlan(
        free=device.free,
        weights=weights,
        tables=tables,
        adapters=adapters,
        workspace=workspace,
        reserve=reserve,
        cache=max(left, 0),
        missing=max(-left, 0),
        token_bytes=token_bytes(model, engine.kv_precision, device.float_bytes),
        page_size=engine.page_size,
    )


def token_bytes(model: ModelConfig, kv_precision: str, float_bytes: int) -> int:
    """Of one token in the KV cache: keys and values of all layers; in FP8 with a float32 scale per head."""
    if kv_precision == "fp8":
        return 2 * model.num_layers * model.num_kv_heads * (model.head_dim + 4)
    return model.kv_bytes_per_token(float_bytes)


def weight_bytes(model: ModelConfig, scheme: Scheme, float_bytes: int, matrix_bytes: MatrixBytes | None = None) -> int:
    """Of all weights.

    Args:
        float_bytes: of the compute dtype, in which norms, biases and unquantised matrices are kept.
        matrix_bytes: for a file, whose own forms count; None = as if the file had floats.
    """

    def of_floats(matrix: Matrix, kept: Kept) -> int:
        return kept.nbytes(matrix.outputs, matrix.inputs, float_bytes)

    count = matrix_bytes or of_floats
    embedding, *layers, head = matrices(model)
    total = vector_parameters(model) * float_bytes
    total += sum(count(matrix, scheme.projection(matrix.name, model.num_layers)) for matrix in layers)
    if model.tie_word_embeddings:
        return total + count(embedding, scheme.head)
    return total + count(embedding, scheme.embedding) + count(head, scheme.head)


def parameter_count(model: ModelConfig) -> int:
    """A tied head counts once."""
    found = [*matrices(model)][: -1 if model.tie_word_embeddings else None]
    return sum(matrix.outputs * matrix.inputs for matrix in found) + vector_parameters(model)


def matrices(model: ModelConfig) -> Iterator[Matrix]:
    """The embedding first, all projections, the head last (of a tied model too, where it is the embedding)."""
    hidden, ffn, vocab = model.hidden_size, model.intermediate_size, model.vocab_size
    yield Matrix("model.embed_tokens.weight", vocab, hidden)
    for layer in range(model.num_layers):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        yield Matrix(attention + "q_proj.weight", model.q_size, hidden)
        yield Matrix(attention + "k_proj.weight", model.kv_size, hidden)
        yield Matrix(attention + "v_proj.weight", model.kv_size, hidden)
        yield Matrix(attention + "o_proj.weight", hidden, model.q_size)
        yield Matrix(mlp + "gate_proj.weight", ffn, hidden)
        yield Matrix(mlp + "up_proj.weight", ffn, hidden)
        yield Matrix(mlp + "down_proj.weight", hidden, ffn)
    yield Matrix("lm_head.weight", vocab, hidden)


def vector_parameters(model: ModelConfig) -> int:
    """Two norms per layer and the last one; biases where the model has them."""
    biases = model.q_size + 2 * model.kv_size if model.qkv_bias else 0
    return model.num_layers * (2 * model.hidden_size + biases) + model.hidden_size


def table_bytes(model: ModelConfig, engine: EngineConfig, device: Device) -> int:
    """float32 [positions, head_dim] of angles and int32 [rows, pages of a sequence] of pages."""
    positions = engine.max_model_len or context_limit(model)
    return 4 * positions * model.head_dim + 4 * engine.batch_on(device.kind).size * -(-positions // engine.page_size)


def adapter_bytes(model: ModelConfig, engine: EngineConfig, device: Device) -> int:
    """Slots of LoRA adapters; on a CPU they are float32, as `engine.model.lora` explains."""
    return (
        engine.max_loras * slot_size(model, engine.max_lora_rank) * (4 if device.kind == "cpu" else device.float_bytes)
    )


def context_limit(model: ModelConfig) -> int:
    """Tokens that a sequence may have if memory allows."""
    return min(model.max_position_embeddings, LONGEST_CONTEXT)


def step_bytes(model: ModelConfig, engine: EngineConfig, device: Device) -> int:
    """What a step of max_batch_tokens tokens takes beside weights and cache, at its worst moment.

    That is in the MLP (float32 residual, hidden states, the queries' storage, gate | up and their product), in
    attention where it is plain torch (compiled kernels keep their scores on the chip), or at the end (the draw from the
    logits of all rows, whichever rank made them).
    """
    if device.kind == "cuda" and not device.plain:
        return _triton_bytes(model, engine, device.float_bytes)
    (size, tokens), floats = engine.batch_on(device.kind), device.float_bytes
    rows = min(tokens, max(size, 1 + engine.max_draft_tokens))
    ranks, width, inner = engine.tensor_parallel_size, model.hidden_size, model.intermediate_size
    vocab = model.vocab_size * ranks
    stream = tokens * (width * (4 + floats) + (model.q_size + 2 * model.kv_size) * floats + 6 * 8)
    if ranks > 1 and device.kind == "cpu":
        stream += tokens * width * (ranks * floats + 4)  # the parts of a sum side by side, and their float32 sum
    draw = rows * vocab * _DRAW_BYTES
    if not device.plain:  # all layers in one call, which keeps normed and attended tokens too, outside of torch
        return max(stream + tokens * (width + model.q_size + 3 * inner) * floats, draw)
    head, scheme = 0, SCHEMES[engine.precision]
    mlp = tokens * inner * (_PLAIN_W8A8_BYTES if scheme.quantise_inputs else _PLAIN_MLP_BYTES)
    if scheme.linear is not Kept.FLOAT:
        mlp = max(
            mlp, tokens * 2 * inner * (4 + floats) + min(DECODE_SLAB, 2 * inner * width) * _DECODE_BYTES[scheme.linear]
        )
    if scheme.head is not Kept.FLOAT:
        head = rows * vocab * 4 + min(DECODE_SLAB, vocab * width) * _DECODE_BYTES[scheme.head]
    return max(stream + max(mlp, _attention_bytes(model, engine, tokens, floats), head), draw)


def _attention_bytes(model: ModelConfig, engine: EngineConfig, tokens: int, floats: int) -> int:
    """Of plain torch, one sequence with the longest context at a time, its queries slab by slab."""
    context = engine.max_model_len or context_limit(model)
    queries = min(tokens, max(1, SCORE_SLAB // (model.num_heads * context)))
    scores = queries * context * (model.num_heads * _SCORE_BYTES + _MASK_BYTES)
    outputs = tokens * model.q_size * floats
    return model.kv_size * context * _GATHERED_BYTES + scores + outputs


def _triton_bytes(model: ModelConfig, engine: EngineConfig, floats: int) -> int:
    """Of a step in Triton kernels: products of few rows decode weights in registers, decode reads the cache in place.

    What is left are activations, weights as numbers for products of many rows, a slab at a time, and WORKSPACE: in
    attention the sums of a context's parts, in products of few rows those of parts of the inputs. A table in codes is
    looked up in plain torch. At the end there are the logits of the rows that sample or of a slab of a prompt's, and
    what the choice or logprobs need beside them. Codes of a long prompt's context as numbers have a place of their own.
    """
    size, tokens = engine.batch_on("cuda")
    width, inner = model.hidden_size, model.intermediate_size
    stream = tokens * (width * (4 + 2 * floats) + (model.q_size + 2 * model.kv_size) * floats + 6 * 8)
    parts = WORKSPACE + floats * max(tokens * model.q_size, min(tokens, SPLIT_ROWS) * 2 * inner)
    scheme = SCHEMES[engine.precision]
    looked_up = 0 if scheme.embedding is Kept.FLOAT else tokens * width * _DECODE_BYTES[scheme.embedding]
    slab = 0 if scheme.linear is Kept.FLOAT else min(DECODE_SLAB, 2 * inner * width) * floats
    layers = max(stream + max(tokens * 3 * inner * floats, tokens * 2 * inner * floats + slab, parts), looked_up)
    vocab = model.vocab_size * engine.tensor_parallel_size
    rows = min(tokens, max(size, 1 + engine.max_draft_tokens))
    head = 0 if scheme.head is Kept.FLOAT else min(DECODE_SLAB, vocab * width) * floats
    chosen = rows * 4 * vocab + max(head, rows * -(-vocab // CHOICE_CHUNK) * CHOICE_CHUNK * _CHOICE_BYTES)
    scored = min(tokens, max(1, LOGITS_SLAB // (4 * vocab))) * vocab * _TARGET_BYTES
    plain = PLAIN_PAGES if engine.kv_precision == "fp8" and tokens >= PLAIN_PAGES_FROM else 0
    return plain + max(layers, tokens * width * floats + max(chosen, scored))
