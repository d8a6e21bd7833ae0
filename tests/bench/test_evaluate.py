"""bench.evaluate: its table; and, where lm-eval is installed, the harness itself against a real server and against its
own `hf` model on the same weights."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from bench import scoring
from bench.evaluate import PUBLISHED, Evaluation, Measured, main, metrics, show
from bench.scoring import Scorer
from tests.e2e.conftest import ServerProcess

PREFIX_TOKEN = 1  # what transformers calls SmolLM2's beginning of sequence
TOLERANCE = 0.02  # of a sum over up to some hundred tokens; both compute in float32
QUESTIONS = 6


def printed(evaluation: Evaluation) -> str:
    console = Console(file=io.StringIO(), width=100)
    show(evaluation, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def evaluation(*results: Measured, limit: int | None = None) -> Evaluation:
    return Evaluation(model="m", dtype="bfloat16", parameters=12_247_782_400, limit=limit, results=list(results))


def measured(task: str, metric: str, value: float) -> Measured:
    return Measured(task=task, metric=metric, value=value, stderr=0.01, samples=100, shots=5)


def test_the_published_averages_are_those_of_the_model_card() -> None:
    for precision, average in (("bf16", 71.61), ("fp8", 71.28)):
        values = [getattr(each, precision) for each in PUBLISHED.values()]
        assert sum(values) / len(values) == pytest.approx(average, abs=0.006)


def test_metrics_are_read_with_their_errors() -> None:
    found = {"alias": "t", "sample_len": 7, "acc,none": 0.5, "acc_stderr,none": 0.25, "f1,x": 1, "f1_stderr,x": "N/A"}
    assert metrics("t", found, 3) == [
        Measured(task="t", metric="acc,none", value=0.5, stderr=0.25, samples=7, shots=3),
        Measured(task="t", metric="f1,x", value=1.0, stderr=None, samples=7, shots=3),
    ]


def test_measured_stands_beside_published_and_the_average_needs_all_tasks() -> None:
    results = [measured(task, each.metric, each.bf16 / 100) for task, each in PUBLISHED.items()]
    whole = printed(evaluation(*results, measured("other", "ppl,none", 12.5), limit=9))
    assert "12.25 B parameters" in whole
    assert "9 questions" in whole
    rows = {line.split()[0]: line.split() for line in whole.splitlines() if line.strip()}
    assert rows["gsm8k"] == ["gsm8k", "exact_match,strict-match", "5", "100", "74.45", "1.00", "74.45", "73.01"]
    assert rows["average"] == ["average", "71.61", "71.61", "71.28"]
    assert rows["other"][-2:] == ["12.5000", "0.0100"]
    assert "average" not in printed(evaluation(*results[1:]))
    assert msgspec.json.decode(msgspec.json.encode(evaluation(*results)), type=Evaluation) == evaluation(*results)


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "CHANNEL", [])  # no patience with it
    result = CliRunner().invoke(main, ["--address", "127.0.0.1:1", "--tasks", "x"])
    assert result.exit_code == 1
    assert "127.0.0.1:1: UNAVAILABLE" in result.output


# -- the real harness --------------------------------------------------------------------------------------------------


def unpacked(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode()


def local_tasks(folder: Path, test_data: Path, seed: int) -> list[str]:
    """Tasks of each kind of request, from data that lie here: which solution follows a problem's text (HumanEval), how
    likely a text is, and what the model writes next (the Declaration of Human Rights)."""
    rng = random.Random(seed)
    problems = [json.loads(line) for line in unpacked(test_data / "text" / "HumanEval.jsonl.gz").splitlines()]
    texts = json.loads(unpacked(test_data / "text" / "udhr.json.gz"))
    rows = []
    for problem in rng.sample([p for p in problems if len(p["prompt"]) < 600], QUESTIONS):
        wrong = rng.sample([p["canonical_solution"][:200] for p in problems if p is not problem], 3)
        right, answer = problem["canonical_solution"][:200], rng.randrange(4)
        rows.append({"text": problem["prompt"], "choices": [*wrong[:answer], right, *wrong[answer:]], "answer": answer})
    starts = [rng.randrange(3000) for _ in texts]
    pieces = [{"text": text[at : at + 400].strip()} for at, text in zip(starts, texts.values(), strict=True)]
    kinds: dict[str, tuple[list[dict[str, Any]], str]] = {
        "local_solutions": (
            rows,
            'output_type: multiple_choice\ndoc_to_text: "{{text}}"\ndoc_to_choice: "{{choices}}"\n'
            "doc_to_target: answer\nnum_fewshot: 1\nfewshot_split: test\n"
            "metric_list:\n  - metric: acc\n  - metric: acc_norm\n",
        ),
        "local_texts": (
            pieces,
            'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
            "metric_list:\n  - metric: bits_per_byte\n",
        ),
        "local_words": (
            pieces[:6],
            'output_type: generate_until\ndoc_to_text: "{{text}}"\ndoc_to_target: "{{text}}"\n'
            'generation_kwargs:\n  until: ["."]\n  max_gen_toks: 12\nmetric_list:\n  - metric: exact_match\n',
        ),
    }
    for name, (data, body) in kinds.items():
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in data))
        where = (
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {path}\ntest_split: test\n"
        )
        (folder / f"{name}.yaml").write_text(where + body)
    return list(kinds)


@pytest.fixture
def exact_server(smollm2_path: Path) -> Iterator[ServerProcess]:
    running = ServerProcess.start(smollm2_path, "--dtype", "fp32")
    yield running
    running.kill()


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install -e '.[eval]'")
def test_the_harness_scores_the_server_as_it_scores_transformers(
    exact_server: ServerProcess,
    smollm2_path: Path,
    smollm2_oracle: Any,
    test_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    import lm_eval
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from bench.harness import ServerLM

    print(f"seed {(seed := random.randrange(10**6))}")
    tasks = local_tasks(tmp_path, test_data, seed)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    )
    peers = {
        "server": ServerLM(Scorer(exact_server.address, prefix_token=PREFIX_TOKEN)),
        "hf": HFLM(pretrained=reference, tokenizer=smollm2_oracle, batch_size=1),
    }
    runs = {
        name: lm_eval.simple_evaluate(
            model=peer, tasks=tasks, task_manager=TaskManager(include_path=str(tmp_path)), bootstrap_iters=0
        )
        for name, peer in peers.items()
    }
    largest, compared, same_texts = 0.0, 0, []
    for task in tasks:
        ours, theirs = (runs[name]["samples"][task] for name in ("server", "hf"))
        for mine, other in zip(ours, theirs, strict=True):
            assert mine["arguments"] == other["arguments"]
            if task == "local_words":
                same_texts.append(mine["resps"] == other["resps"])
                continue
            for [score], [expected] in zip(mine["resps"], other["resps"], strict=True):
                values = zip(score, expected, strict=True) if task == "local_solutions" else [(score, expected)]
                for (value, wanted), kind in zip(values, ("logprob", "greedy"), strict=False):
                    if kind == "greedy":
                        assert str(value) == str(wanted)
                        continue
                    compared += 1
                    largest = max(largest, abs(float(value) - float(wanted)))
    print(
        f"{compared} log-likelihoods, largest difference {largest:.5f}; same texts {sum(same_texts)}/{len(same_texts)}"
    )
    print({task: [runs[name]["results"][task] for name in runs] for task in tasks})
    assert compared == 4 * QUESTIONS + 12
    assert largest < TOLERANCE
    assert sum(same_texts) >= len(same_texts) - 1  # greedy texts may part at a near tie
