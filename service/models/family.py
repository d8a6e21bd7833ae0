"""Shapes of the published models that this engine runs, so that their memory can be told before anything is fetched.

Sources: the config.json of each repository; head_dim of Mistral NeMo and Small is 128 and not hidden / heads.
"""

from __future__ import annotations

import msgspec

from engine import ModelConfig
from engine.config import Llama3RopeScaling

NEMO_12B = ModelConfig(
    architecture="MistralForCausalLM",
    vocab_size=131072,
    hidden_size=5120,
    num_layers=40,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    max_position_embeddings=131072,
    bos_token_id=1,
    eos_token_ids=(2,),
)
MINITRON_8B = msgspec.structs.replace(NEMO_12B, hidden_size=4096, intermediate_size=11520, max_position_embeddings=8192)
SMALL_24B = msgspec.structs.replace(NEMO_12B, intermediate_size=32768, rope_theta=1e8, max_position_embeddings=32768)
SMALL_31_24B = msgspec.structs.replace(SMALL_24B, rope_theta=1e9, max_position_embeddings=131072)
MISTRAL_7B = msgspec.structs.replace(
    NEMO_12B, vocab_size=32000, hidden_size=4096, num_layers=32, rope_theta=1e4, sliding_window=4096
)
MISTRAL_7B_V3 = msgspec.structs.replace(
    MISTRAL_7B, vocab_size=32768, rope_theta=1e6, sliding_window=None, max_position_embeddings=32768
)
LLAMA_3_8B = msgspec.structs.replace(
    MISTRAL_7B,
    architecture="LlamaForCausalLM",
    vocab_size=128256,
    rope_theta=5e5,
    sliding_window=None,
    max_position_embeddings=8192,
    bos_token_id=128000,
    eos_token_ids=(128001, 128009),
)
LLAMA_31_8B = msgspec.structs.replace(
    LLAMA_3_8B,
    rope_scaling=Llama3RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    ),
    max_position_embeddings=131072,
    eos_token_ids=(128001, 128008, 128009),
)
SMOLLM2_135M = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=49152,
    hidden_size=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
    rms_norm_eps=1e-5,
    rope_theta=1e5,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_ids=(2,),
)
