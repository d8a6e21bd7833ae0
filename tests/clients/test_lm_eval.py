"""lm-evaluation-harness over HTTP, on a task of four questions that lies beside this file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from tests.clients.conftest import MODEL, from_project
from tests.server import ServerProcess

TASKS = Path(__file__).parent / "tasks"


@pytest.fixture
def evaluate(server: ServerProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(TASKS)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)

    def run(kind: str, route: str, task: str, batch: int = 1) -> Any:
        address = f"http://{server.http_address}{route}"
        return lm_eval.simple_evaluate(
            model=kind,
            model_args={"base_url": address, "model": MODEL, "num_concurrent": 4, "max_retries": 1},
            batch_size=batch,
            tasks=[task],
            task_manager=TaskManager(include_path=str(TASKS)),
            apply_chat_template="chat" in kind,
            bootstrap_iters=0,
        )

    return run


@pytest.mark.parametrize("batch", [1, 3])
def test_likelihoods_are_those_of_our_own_evaluation(evaluate: Any, server: ServerProcess, batch: int) -> None:
    """The tokenizer is the server's: `tokenizer_backend` finds /tokenizer_info and /tokenize by itself."""
    found = evaluate("local-completions", "/v1/completions", "capitals", batch)
    samples = found["samples"]["capitals"]
    pairs = [list(argument[:2]) for sample in samples for argument in sample["arguments"]]
    theirs = [answer for sample in samples for answer in sample["filtered_resps"]]
    ours = json.loads(from_project("likelihoods", server.address, pairs))
    assert len(theirs) == len(ours) == 12
    for (likelihood, greedy), (our_likelihood, our_greedy) in zip(theirs, ours, strict=True):
        assert float(likelihood) == pytest.approx(our_likelihood, abs=1e-3)
        assert (str(greedy) == "True") == our_greedy
    assert found["results"]["capitals"]["acc,none"] == 1.0
