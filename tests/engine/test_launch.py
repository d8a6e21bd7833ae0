"""A launch asks its device nothing: what a host would wait for on a GPU, seen in the calls that it makes of torch.

Asking is what needs a tensor's numbers, or a place of one set to a number: `x[i] = 1` copies the 1 from memory that is
not pinned, for which torch waits until the device has done all that was launched before; `x[i].fill_(1)` does not.
Operators between the matrices stay out of it: those of a GPU are kernels, and here plain torch stands in for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from engine.config import EngineConfig
from engine.model.decoder import Decoder
from engine.request import SamplingParams
from engine.runner import Runner
from engine.sampling.device import DeviceRows
from engine.sampling.largest import largest
from engine.sizing import CacheSize
from engine.step import LAST_SAMPLED, RowInit, RowWork, StepPlan, Targets
from tests.engine.oracle import BASE, decoder_of, transformers_model

PROMPT = [1, 2, 3]
KINDS = {
    "greedy": SamplingParams(temperature=0.0),
    "drawn": SamplingParams(temperature=0.8, top_k=5, top_p=0.9),
    "logprobs": SamplingParams(logprobs=3),
    "biased": SamplingParams(logit_bias={3: 1.0}),
    "not to end": SamplingParams(min_tokens=5, stop_token_ids=(4,)),
    "penalised": SamplingParams(repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.5),
}
_METHODS = "item tolist cpu numpy nonzero unique __bool__ __int__ __float__ __index__ __contains__"
ASKING = {torch.nonzero, torch.unique, torch.equal, torch.allclose, torch.masked_select}
ASKING |= {getattr(Tensor, name) for name in _METHODS.split()}


class Asked(TorchFunctionMode):
    """Notes the calls that a GPU would make its host wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        sets_number = func is Tensor.__setitem__ and not isinstance(args[1], slice) and not isinstance(args[2], Tensor)
        if func in ASKING or sets_number:
            self.found.append(f"{func.__name__} {args[1:]}")
        return func(*args, **(kwargs or {}))


@contextmanager
def nobody_asks() -> Iterator[None]:
    with Asked() as asked:
        yield
    assert asked.found == []


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Samples as on a GPU, though it takes the likeliest always; an operator is free to look at its tensors."""
    decoder = decoder_of(BASE, transformers_model(BASE), max_len=64)
    rows = DeviceRows(8, torch.device("cpu"), lambda logits, *rest: largest(logits))
    monkeypatch.setattr("engine.sampler.find_device_rows", lambda count, device: rows)
    hidden = BASE.hidden_size
    monkeypatch.setattr(Decoder, "forward", lambda self, ids, batch, cache, layers=None: torch.zeros(len(ids), hidden))
    return Runner(EngineConfig(model_path="-", max_batch_size=8, page_size=16), decoder, CacheSize(16, 64, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_of_a_request_asks(runner: Runner, kind: str) -> None:
    start = [RowInit(0, KINDS[kind], 7, PROMPT, [])]
    with nobody_asks():
        runner.launch(StepPlan([RowWork(0, 0, PROMPT, [3], sample=True)], start))
        for position in range(len(PROMPT), 24):  # further than tables of penalties are long at first
            pages = [5] if position == 16 else []
            runner.launch(StepPlan([RowWork(0, position, [LAST_SAMPLED], pages, sample=True)]))


def test_drafts_prompt_logprobs_and_chunks_beside_each_other_ask_nothing(runner: Runner) -> None:
    admitted = [RowInit(row, KINDS["greedy"], 0, PROMPT, []) for row in range(3)]
    work = [
        RowWork(0, 0, PROMPT, [0], sample=True, drafts=2),
        RowWork(1, 0, PROMPT, [1], sample=True, targets=Targets(1, PROMPT[1:], 2)),
        RowWork(2, 0, PROMPT, [2], sample=False),
    ]
    with nobody_asks():
        runner.launch(StepPlan(work, admitted))
        runner.launch(StepPlan([], released=[0, 1, 2]))


def test_what_asks_is_seen() -> None:
    x = torch.zeros(3)
    with Asked() as asked:
        x[1] = 2
        x[torch.tensor([0])] = 1.0
        x[:2] = 3
        x[0] = x[1]
        bool(x[0] > 0)
    assert [call.split()[0] for call in asked.found] == ["__setitem__", "__setitem__", "__bool__"]
