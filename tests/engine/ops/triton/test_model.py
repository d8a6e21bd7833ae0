"""A whole model on the kernels of a GPU against the same model in plain torch: the same steps, logits and tokens.

Everything between them is the engine's own: loading, rows, sampler. What only the two together can break shows here:
codes that a norm leaves for the next product, queries that are strided, contexts that grow in a cache of codes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoint import open_checkpoint
from engine.config import EngineConfig
from engine.model.load import load_decoder
from engine.ops.reference import ReferenceOps
from engine.ops.triton import TritonOps
from engine.ops.triton.linear import TritonProducts
from engine.ops.triton.sampler import choose
from engine.request import SamplingParams
from engine.runner import Runner
from engine.sampler import Sampler
from engine.sampling.device import DeviceRows
from engine.schemes import SCHEMES
from engine.sizing import CacheSize
from engine.step import RowInit, RowWork, SampledToken, StepPlan
from tests.tiny_models import write_hf

CPU = torch.device("cpu")
VOCAB, PAGE, CONTEXT = 128, 16, 64
SHAPE = {"vocab_size": VOCAB, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
GREEDY, DRAWN = SamplingParams(temperature=0.0, logprobs=2), SamplingParams(temperature=0.8, top_k=20, top_p=0.9)


class Replay:
    """Runs steps with the tokens that it is told, and keeps the logits of each."""

    def __init__(self, folder: Path, precision: str, kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
        options = EngineConfig(
            model_path=str(folder), precision=precision, kv_precision=kv, page_size=PAGE, max_batch_size=3, threads=1
        )
        with torch.inference_mode(), open_checkpoint(str(folder)) as checkpoint:
            decoder = load_decoder(
                checkpoint, torch.float32, CPU, CONTEXT, 1, lambda phase, done: None, SCHEMES[precision]
            )
        self._runner = Runner(options, decoder, CacheSize(12, CONTEXT, 4))
        self.logits: list[Tensor] = []
        sample = Sampler.sample

        def keep(sampler: Sampler, logits: Tensor, *rest: Any) -> object:
            self.logits.append(logits.clone())
            return sample(sampler, logits, *rest)

        self._keep, self._patch = keep, monkeypatch

    def run(self, plan: StepPlan) -> list[SampledToken]:
        with self._patch.context() as patch:
            patch.setattr(Sampler, "sample", self._keep)
            return self._runner.run(plan).sampled


def on_triton(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """From now on models are built as for that card; of 132 processors, so that products and contexts are cut."""
    products = TritonProducts(CPU, 132, decodes=capability >= (8, 9), interpreted=True)
    monkeypatch.setattr("engine.model.load.select_ops", lambda kernels, device: TritonOps(capability))
    monkeypatch.setattr("engine.model.load.find_products", lambda device: products)
    monkeypatch.setattr("engine.sampler.find_device_rows", lambda rows, device: DeviceRows(rows, device, choose))


def steps(rest: list[list[int]]) -> list[StepPlan]:
    """Prefill of two rows, one in chunks; decode; a third row's prompt beside decode; drafts; decode of all.

    Args:
        rest: what the two rows go on with, whatever is chosen.
    """
    first, second, third = torch.randint(3, VOCAB, (3, 20), generator=torch.Generator().manual_seed(1)).tolist()
    a, b = rest

    def init(row: int, prompt: list[int], sampling: SamplingParams) -> RowInit:
        return RowInit(row, sampling, 7 + row, prompt, [])

    def decode(row: int, start: int, token: int) -> RowWork:
        return RowWork(row, start, [token], [], sample=True)

    return [
        StepPlan(
            [RowWork(0, 0, first[:11], [4, 9], sample=False), RowWork(1, 0, second[:5], [2], sample=True)],
            [init(0, first, GREEDY), init(1, second[:5], DRAWN)],
        ),
        StepPlan([RowWork(0, 11, first[11:], [], sample=True), decode(1, 5, b[0])]),
        StepPlan([decode(0, 20, a[0]), decode(1, 6, b[1])]),
        StepPlan(
            [RowWork(2, 0, third[:10], [0], sample=True), decode(0, 21, a[1]), decode(1, 7, b[2])],
            [init(2, third[:10], GREEDY)],
        ),
        StepPlan([RowWork(0, 22, a[2:5], [], sample=True, drafts=2), decode(1, 8, b[3])]),
        StepPlan([decode(0, 23, a[3]), decode(1, 9, b[4]), decode(2, 10, third[10])]),
    ]


# Precision, keys and values, card. One more in the last place of a number can be the next code, of many thousands.
CASES = [
    ("bf16", "auto", (9, 0)),
    ("fp8", "auto", (9, 0)),
    ("fp8-weight-only", "fp8", (8, 0)),
    ("int4", "auto", (8, 0)),
]


@pytest.mark.parametrize(("precision", "kv", "card"), CASES, ids=[f"{a} {b} sm_{c}{d}" for a, b, (c, d) in CASES])
def test_the_model_says_the_same(
    precision: str, kv: str, card: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_hf(tmp_path / "model", **SHAPE)
    monkeypatch.setattr("engine.model.load.load_kernels", lambda threads: None)
    plain = Replay(path, precision, kv, monkeypatch)
    on_triton(monkeypatch, card)
    fast = Replay(path, precision, kv, monkeypatch)
    assert isinstance(plain._runner._decoder._ops, ReferenceOps)
    assert isinstance(fast._runner._decoder._ops, TritonOps)
    going_on = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(2)).tolist()
    differences = []
    for plan in steps(going_on):
        expected, actual = plain.run(plan), fast.run(plan)
        apart = (fast.logits[-1] - plain.logits[-1]).abs().amax(-1)
        differences += apart.tolist()
        if apart.max() < 1e-4:
            assert [(each.row, each.token_id) for each in actual] == [(each.row, each.token_id) for each in expected]
    rounded = precision == "fp8" or kv == "fp8"
    assert max(differences) < (0.5 if rounded else 1e-4)  # of logits that are 1.3 apart
    assert sum(each < 1e-4 for each in differences) > len(differences) / 2
