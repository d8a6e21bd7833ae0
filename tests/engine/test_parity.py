"""Parity on a real model, SmolLM2-135M-Instruct: with transformers in float32, with itself in bfloat16, with llama.cpp.

All comparisons are teacher-forced: greedy texts of equally right engines part at the first near tie. Reference and
subject read the same GGUF file, whose 4-bit weights both dequantise to the same float32 numbers. `pytest -s` prints
the figures. The bounds are a few times the noise between two exact float32 programs, and the rounding of bfloat16.
"""

from __future__ import annotations

import argparse
import asyncio
import pathlib
import textwrap
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from engine.checkpoint import open_checkpoint
from engine.config import EngineConfig
from engine.model.decoder import Decoder
from engine.model.load import load_decoder
from engine.request import SamplingParams
from engine.runner import Runner
from engine.step import RowInit, RowWork, StepPlan
from tests.engine.oracle import teacher_forced

LENGTHS = (1, 2, 3, 5, 8, 13, 17, 24, 31, 32, 33, 40, 48, 63, 64, 65, 80, 96, 120, 200, 450, 700)
LONG_ENOUGH = slice(6, -1)  # the prompts from 17 to 450 tokens: what roundings are measured on
GREEDY_TOKENS = 64


@dataclass(frozen=True)
class Oracle:
    """transformers on the same file, and prompts: texts of the standard library's documentation, cut to LENGTHS."""

    model: transformers.PreTrainedModel
    prompts: list[list[int]]

    @torch.inference_mode()
    def logits(self, prompt: list[int]) -> Tensor:
        return self.model(torch.tensor([prompt])).logits[0]


@pytest.fixture(scope="module")
def oracle(smollm2_oracle: Any, smollm2_reference: transformers.PreTrainedModel) -> Oracle:
    texts = [
        textwrap.dedent(doc.__doc__ or "") for doc in (argparse, textwrap, threading.Thread, asyncio, pathlib.Path)
    ]
    corpus = smollm2_oracle("\n\n".join([*texts, pathlib.Path(argparse.__file__).read_text()[:12000]]))["input_ids"]
    prompts, at = [], 0
    for length in LENGTHS:
        at = 0 if at + length > len(corpus) else at
        prompts.append(corpus[at : at + length])
        at += length
    assert [len(prompt) for prompt in prompts] == list(LENGTHS)
    return Oracle(smollm2_reference, prompts)


def load(path: Path, dtype: torch.dtype) -> Decoder:
    with torch.inference_mode(), open_checkpoint(str(path)) as checkpoint:
        return load_decoder(
            checkpoint, dtype, torch.device("cpu"), 2048, torch.get_num_threads(), lambda phase, done: None
        )


@pytest.fixture(scope="module")
def decoder(smollm2_path: Path) -> Decoder:
    return load(smollm2_path, torch.float32)


@pytest.fixture(scope="module")
def exact(oracle: Oracle, decoder: Decoder) -> list[Tensor]:
    """Our float32 logits after every token of each prompt: side by side in chunks, and the long ones alone."""
    return teacher_forced(decoder, oracle.prompts[:-2], chunk=37) + [
        teacher_forced(decoder, [prompt], chunk=256, page_size=64)[0] for prompt in oracle.prompts[-2:]
    ]


def test_float32_logits_and_choices_are_those_of_transformers(oracle: Oracle, exact: list[Tensor]) -> None:
    worst, flips, tokens = 0.0, 0, 0
    for prompt, logits in zip(oracle.prompts, exact, strict=True):
        expected = oracle.logits(prompt)
        worst = max(worst, (logits - expected).abs().max().item())
        flips += int((logits.argmax(-1) != expected.argmax(-1)).sum())
        tokens += len(prompt)
    print(
        f"\nfloat32 vs transformers: {len(LENGTHS)} prompts, {tokens} tokens, max |Δlogit| {worst:.1e}, {flips} flips"
    )
    assert worst <= 1e-3
    assert flips == 0


def test_greedy_texts_are_those_of_transformers(oracle: Oracle, smollm2_path: Path) -> None:
    prompts = [oracle.prompts[i] for i in (4, 10, 18)]
    config = EngineConfig(
        model_path=str(smollm2_path), dtype="float32", max_model_len=512, threads=torch.get_num_threads()
    )
    runner = Runner.load(config, lambda phase, done: None)
    pages = runner.info.max_model_len // runner.info.page_size
    greedy = SamplingParams(temperature=0.0)
    outputs: list[list[int]] = [[] for _ in prompts]
    plan = StepPlan(
        work=[RowWork(r, 0, p, list(range(r * pages, (r + 1) * pages)), sample=True) for r, p in enumerate(prompts)],
        admitted=[RowInit(r, greedy, 0, p, []) for r, p in enumerate(prompts)],
    )
    for _ in range(GREEDY_TOKENS):
        for token in runner.run(plan).sampled:
            outputs[token.row].append(token.token_id)
        plan = StepPlan(
            work=[
                RowWork(r, len(p) + len(outputs[r]) - 1, outputs[r][-1:], [], sample=True)
                for r, p in enumerate(prompts)
            ]
        )
    for prompt, output in zip(prompts, outputs, strict=True):
        # By induction its greedy text: each of our tokens is its choice after the ones before.
        assert output == oracle.logits(prompt + output)[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_bfloat16_is_close_to_float32(oracle: Oracle, exact: list[Tensor], smollm2_path: Path) -> None:
    rounded = teacher_forced(load(smollm2_path, torch.bfloat16), oracle.prompts[LONG_ENOUGH])
    mean, p99, agreement = compare("bfloat16 vs float32", exact[LONG_ENOUGH], rounded)
    # transformers' own bfloat16 model: mean 1.2e-3, p99 6e-3, argmax 97 %.
    assert mean <= 8e-4
    assert p99 <= 5e-3
    assert agreement >= 0.97


def test_fp8_keys_and_values_cost_little(oracle: Oracle, decoder: Decoder, exact: list[Tensor]) -> None:
    rounded = teacher_forced(decoder, oracle.prompts[LONG_ENOUGH], kv_dtype=torch.float8_e4m3fn)
    mean, p99, agreement = compare("FP8 cache vs float32", exact[LONG_ENOUGH], rounded)
    # Three bits of fraction are what they are, whatever the scale: measured 6e-3, 6e-2 and 95 %.
    assert mean <= 1.2e-2
    assert p99 <= 0.12
    assert agreement >= 0.93


def compare(name: str, exact: list[Tensor], other: list[Tensor]) -> tuple[float, float, float]:
    """Mean and 99th percentile of the KL divergence in nats, and the share of same choices, of logits."""
    log_p, log_q = torch.cat(exact).log_softmax(-1), torch.cat(other).log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    mean, p99 = divergence.mean().item(), divergence.quantile(0.99).item()
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).float().mean().item()
    print(f"\n{name}: {len(log_p)} tokens, mean KL {mean:.1e}, p99 {p99:.1e}, argmax {agreement:.1%}")
    return mean, p99, agreement


@pytest.fixture(scope="module")
def llama_cpp(smollm2_path: Path) -> object:
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(smollm2_path)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 1024, 1, False, 0
    params.cpuparams.n_threads = torch.get_num_threads()
    return xllamacpp.Server(params)


def test_log_probabilities_are_those_of_llama_cpp_on_its_own_text(
    oracle: Oracle, decoder: Decoder, llama_cpp: object
) -> None:
    differences, agreements = [], []
    for prompt in (oracle.prompts[i] for i in (6, 9, 13, 16, 18)):
        answer = llama_cpp.handle_completions(  # type: ignore[attr-defined]
            {"prompt": prompt, "temperature": 0, "logprobs": 5, "max_tokens": GREEDY_TOKENS}
        )
        content = answer["choices"][0]["logprobs"]["content"]
        tokens = [entry["id"] for entry in content]
        logits = teacher_forced(decoder, [prompt + tokens[:-1]])[0][len(prompt) - 1 :]
        ours = logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
        differences.append(ours - torch.tensor([entry["logprob"] for entry in content]))
        agreements.append(logits.argmax(-1) == torch.tensor(tokens))
    difference, agreement = torch.cat(differences).abs(), torch.cat(agreements).float().mean().item()
    mean, worst = difference.mean().item(), difference.max().item()
    print(f"\nllama.cpp: {len(difference)} tokens, |Δlogp| mean {mean:.3f}, max {worst:.2f}, argmax {agreement:.1%}")
    assert mean <= 0.06
    assert worst <= 0.5
    assert agreement >= 0.95
