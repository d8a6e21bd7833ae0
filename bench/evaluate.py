"""`python -m bench.evaluate`: tasks of lm-evaluation-harness against a running server, measured beside published.

The published figures are those of Mistral NeMo Instruct in bf16 and in FP8 (static, per tensor) on the tasks of the
first Open LLM Leaderboard, from the model card of RedHatAI/Mistral-Nemo-Instruct-2407-FP8 (lm-eval with vLLM,
add_bos_token=True, max_model_len=4096, no chat template).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import click
import grpc
import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from bench.measure import write_result
from bench.scoring import Scorer


class Published(msgspec.Struct, frozen=True):
    """A task as it was measured: examples before the question, and the metric in per cent in each precision."""

    shots: int
    metric: str
    bf16: float
    fp8: float


PUBLISHED = {
    "arc_challenge": Published(25, "acc_norm,none", 65.53, 64.68),
    "gsm8k": Published(5, "exact_match,strict-match", 74.45, 73.01),
    "hellaswag": Published(10, "acc_norm,none", 84.32, 84.18),
    "mmlu": Published(5, "acc,none", 68.35, 68.50),
    "truthfulqa_mc2": Published(0, "acc,none", 54.85, 54.96),
    "winogrande": Published(5, "acc,none", 82.16, 82.32),
}


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One metric of one task, as the harness gives it: shares of right answers are between 0 and 1.

    Attributes:
        samples: questions that were asked; of a group of tasks, of all of them.
        shots: examples before each question; None = as the task says.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int
    shots: int | None


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """A result file. `limit`: so many questions of each task only, None = all."""

    schema: int = 1
    model: str
    dtype: str
    parameters: int
    limit: int | None
    results: list[Measured]


@click.command(context_settings={"show_default": True})
@click.option("--address", default="127.0.0.1:8001", help="HOST:PORT of a running server")
@click.option("--model", default="", help="served model; empty = the one there is")
@click.option("--tasks", default=",".join(PUBLISHED), help="names of lm-eval tasks")
@click.option("--include-path", type=click.Path(exists=True, file_okay=False), help="folder with more task files")
@click.option("--shots", type=click.IntRange(0), help="examples before a question; as published if not given")
@click.option("--limit", type=click.IntRange(1), help="questions of each task; all if not given")
@click.option("--concurrency", type=click.IntRange(1), default=32, help="requests under way")
@click.option("--max-length", type=click.IntRange(1), help="tokens of context; 4096 was published with")
@click.option("--prefix-token", type=click.IntRange(0), help="id before texts without context, if the model has no BOS")
@click.option("--json", type=click.Path(path_type=Path), help="also write the result to this file")
def main(
    address: str,
    model: str,
    tasks: str,
    include_path: str | None,
    shots: int | None,
    limit: int | None,
    concurrency: int,
    max_length: int | None,
    prefix_token: int | None,
    json: Path | None,
) -> None:
    """Measure a served model on tasks of lm-evaluation-harness."""
    try:
        scorer = Scorer(address, model=model, concurrency=concurrency, max_length=max_length, prefix_token=prefix_token)
    except grpc.RpcError as error:
        raise click.ClickException(f"{address}: {error.code().name}: {error.details()}") from None
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    results = [
        result
        for task in tasks.split(",")
        for result in evaluate(scorer, task, shots=shots, limit=limit, include_path=include_path)
    ]
    served = scorer.model
    evaluation = Evaluation(
        model=served.name, dtype=served.dtype, parameters=served.parameters, limit=limit, results=results
    )
    if json is not None:
        write_result(json, evaluation)
    show(evaluation, Console())


def evaluate(
    scorer: Scorer, task: str, *, shots: int | None, limit: int | None, include_path: str | None
) -> list[Measured]:
    """Run one task, or group of tasks, and give its metrics.

    Raises:
        click.ClickException: lm-eval is not installed, or does not know the task.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise click.ClickException("lm-eval is not installed: pip install -e '.[server,eval]'") from None
    from bench.harness import ServerLM

    manager = TaskManager(include_path=include_path)
    if task not in manager.all_tasks:
        raise click.ClickException(f"--tasks: lm-eval knows no task {task!r}")
    if shots is None and task in PUBLISHED:
        shots = PUBLISHED[task].shots
    run = lm_eval.simple_evaluate(
        model=ServerLM(scorer),
        tasks=[task],
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=1000,  # for metrics that are no means
    )
    results: dict[str, dict[str, Any]] = run["results"]
    names = [task] if task in results else list(results)  # a tag stands for several tasks
    return [each for name in names for each in metrics(name, results[name], shots)]


def metrics(task: str, found: Mapping[str, Any], shots: int | None) -> list[Measured]:
    """The metrics among what the harness says of a task: their keys are "name,filter"."""
    return [
        Measured(
            task=task,
            metric=key,
            value=float(value),
            stderr=stderr if isinstance(stderr := found.get(key.replace(",", "_stderr,", 1)), float) else None,
            samples=int(found.get("sample_len", 0)),
            shots=shots,
        )
        for key, value in found.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    ]


def show(evaluation: Evaluation, console: Console) -> None:
    """Measured beside published, in per cent; other tasks and metrics below, as the harness gives them."""
    known = [(each, published) for each in evaluation.results if (published := _published(each)) is not None]
    other = [each for each in evaluation.results if _published(each) is None]
    limit = "" if evaluation.limit is None else f", {evaluation.limit} questions of each task"
    table = Table(
        title=f"{evaluation.model}: {evaluation.parameters / 1e9:.2f} B parameters, {evaluation.dtype}{limit}",
        caption="bf16, FP8: published for Mistral NeMo Instruct 2407 (RedHatAI's model card)" if known else None,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    for column in ("shots", "n", "measured", "±", "bf16", "FP8"):
        table.add_column(column, justify="right")
    for each, published in known:
        error = "" if each.stderr is None else f"{100 * each.stderr:.2f}"
        _add(table, each, f"{100 * each.value:.2f}", error, f"{published.bf16:.2f}", f"{published.fp8:.2f}")
    if {each.task for each, _ in known} == set(PUBLISHED):
        average = 100 * mean(each.value for each, _ in known)
        bf16, fp8 = (mean(getattr(each, name) for each in PUBLISHED.values()) for name in ("bf16", "fp8"))
        table.add_section()
        table.add_row("average", "", "", "", f"{average:.2f}", "", f"{bf16:.2f}", f"{fp8:.2f}")
    table.add_section()
    for each in other:
        _add(table, each, f"{each.value:.4f}", "" if each.stderr is None else f"{each.stderr:.4f}", "", "")
    console.print(table)


def _add(table: Table, each: Measured, *values: str) -> None:
    table.add_row(each.task, each.metric, "" if each.shots is None else str(each.shots), str(each.samples), *values)


def _published(each: Measured) -> Published | None:
    published = PUBLISHED.get(each.task)
    return published if published is not None and published.metric == each.metric else None


if __name__ == "__main__":
    main()
