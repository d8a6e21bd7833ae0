"""Bounds that kernels keep to and that the memory plan counts with. Torch-free."""

from __future__ import annotations

# Plain torch
DECODE_SLAB = 2**25  # weights that are decoded at a time: 64 MiB of bfloat16
SCORE_SLAB = 2**26  # attention scores in hand at a time: 256 MiB of float32

# Triton
LEAST_CAPABILITY = (8, 0)  # of a card: the first with bfloat16 matrix units
WORKSPACE = 2**26  # bytes that a kernel may take for results in parts: of attention, 15 parts of 256 sequences of NeMo
PLAIN_PAGES = 2**29  # bytes of FP8 keys and values as numbers, while prompts are computed: 131,072 tokens of NeMo
PLAIN_PAGES_FROM = 256  # new tokens of a sequence for which they pay: eight blocks of NeMo's queries read them
SPLIT_ROWS = 64  # a product of more rows is not made in parts
CHOICE_CHUNK = 4096  # logits of a program of the sampler: 16 for each of 256 threads, 32 programs for a row of NeMo

# All
LOGITS_SLAB = 2**26  # bytes of a prompt's logits in hand at a time: 128 rows of NeMo, with which the head is as fast
