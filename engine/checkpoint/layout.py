"""The tensors that a decoder consists of: their names (Hugging Face's Llama names) and shapes, from its configuration.

Every reader maps its own names to these, and every checkpoint is held against this list before a weight is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from engine.config import ModelConfig
from engine.errors import CheckpointError, UnsupportedModelError

Shape = tuple[int, ...]
_HARMLESS = (
    "rotary_emb.inv_freq",
    "masked_bias",
    "rope_freqs.weight",
)  # derived from the configuration, or read elsewhere


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Name -> shape of every tensor of the model, weights as [outputs, inputs]."""
    return dict(_tensors(config))


def _tensors(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    hidden, ffn = config.hidden_size, config.intermediate_size
    layer: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (config.q_size, hidden),
        "self_attn.k_proj.weight": (config.kv_size, hidden),
        "self_attn.v_proj.weight": (config.kv_size, hidden),
        "self_attn.o_proj.weight": (hidden, config.q_size),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    if config.qkv_bias:
        layer |= {
            "self_attn.q_proj.bias": (config.q_size,),
            "self_attn.k_proj.bias": (config.kv_size,),
            "self_attn.v_proj.bias": (config.kv_size,),
        }
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for index in range(config.num_layers):
        yield from ((f"model.layers.{index}.{name}", shape) for name, shape in layer.items())
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)


def check_tensors(where: str, found: Mapping[str, Shape], config: ModelConfig) -> None:
    """Hold the shapes that a file has against those that the configuration demands.

    Args:
        where: the file or folder, for messages.
        found: canonical name -> shape.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
        UnsupportedModelError: there is a tensor that this decoder would not use.
    """
    expected = set()
    for name, shape in _tensors(config):  # one by one: a configuration may claim a hundred million layers
        expected.add(name)
        if name not in found:
            raise CheckpointError(f"{where}: tensor {name} is missing")
        if found[name] != shape:
            raise CheckpointError(f"{where}: tensor {name} has shape {list(found[name])}, expected {list(shape)}")
    for name in found:
        tied_copy = name == "lm_head.weight" and config.tie_word_embeddings
        if name not in expected and not tied_copy and not name.endswith(_HARMLESS):
            raise UnsupportedModelError(f"{where}: tensor {name} is not part of the dense Llama/Mistral decoder")


def rotate_half_rows(read: Callable[[int, int], Tensor], start: int, stop: int, head_dim: int) -> Tensor:
    """Rows start .. stop - 1, in rotate-half order, of a projection that is stored in interleaved order.

    Args:
        read: rows as stored. Pairs of a head lie apart in it, so whole heads are asked for.
    """
    first, last = start // head_dim, -(-stop // head_dim)
    rows = rotate_half_order(read(first * head_dim, last * head_dim), last - first, head_dim)
    return rows[start - first * head_dim : stop - first * head_dim]


def rotate_half_order(weight: Tensor, heads: int, head_dim: int) -> Tensor:
    """Reorder the rows of a query or key projection from interleaved RoPE pairs to the two halves of rotate-half.

    Args:
        weight: [heads * head_dim, inputs], or a bias [heads * head_dim].

    Source: `permute` of transformers' `convert_mistral_weights_to_hf.py`; rows (2i, 2i + 1) -> (i, i + dim / 2).
    """
    rows = weight.view(heads, head_dim // 2, 2, -1).transpose(1, 2)
    return rows.reshape(weight.shape)
