"""bench.gpu on a CPU: that the whole program works, that it counts what is wrong, and that its arithmetic is right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from bench.gpu import __main__ as program
from bench.gpu import engine as engine_bench
from bench.gpu import limits as card_limits
from bench.gpu.engine import EngineBench
from bench.gpu.kernels import CASE_SECONDS, HUNG, LOST, Bench, largest_error
from bench.gpu.report import CardLimits, Journal, KernelResult, Report
from bench.gpu.roofline import Arithmetic
from bench.gpu.subject import KV_PRECISION, build
from bench.gpu.workload import FULL, TRIAL
from engine.memory import vector_parameters, weight_bytes
from engine.ops.interface import Activations, Rounding
from engine.ops.reference import ReferenceOps
from engine.runner import Runner
from engine.schemes import SCHEMES

CPU = torch.device("cpu")
LIMITS = CardLimits(
    copy_bytes_per_second=4e12,
    read_bytes_per_second=4e12,
    matrix_flops_per_second=8e14,
    fp8_flops_per_second=16e14,
)


def journal_at(path: Path) -> Journal:
    report = Report(started_at="", card=program.this_card(CPU), trial=True, layers=2, limits=LIMITS)
    return Journal(path, report)


def read(path: Path) -> Report:
    return msgspec.json.decode(path.read_bytes(), type=Report)


def run_part(part: str, path: Path) -> Report:
    program.run_part(part, TRIAL, CPU, journal_at(path), lambda: 100.0)
    return read(path)


def test_a_trial_ends_well_and_its_file_reads_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"

    assert program.main(["--trial", "--layers", "1", "--parts", "step", "--json", str(path)]) == 0

    report = read(path)
    assert (report.trial, report.layers, report.failures) == (True, 1, 0)
    assert report.limits is not None
    assert report.limits.copy_bytes_per_second > 0
    assert report.kernels
    for kernel in report.kernels:
        assert kernel.seconds
        assert kernel.share
    said = capfd.readouterr().out
    assert "no figure below says anything about a GPU" in said
    assert all(kernel.name in said for kernel in report.kernels)


@pytest.mark.parametrize("part", ["attention", "linear"])
def test_kernels_are_right(part: str, tmp_path: Path) -> None:
    report = run_part(part, tmp_path / "gpu.json")
    assert report.kernels
    assert report.failures == 0, [kernel for kernel in report.kernels if not kernel.passed]


@pytest.mark.parametrize("precision", KV_PRECISION)
def test_the_engine_gives_a_figure_for_every_shape_or_says_why_not(precision: str, tmp_path: Path) -> None:
    report = run_part(precision, tmp_path / "gpu.json")

    assert report.faults == []
    names = {figure.name for figure in report.figures}
    assert {"weights made", "cold start, no file read", "TTFT of 40 tokens", "4 requests of 40 + 8"} <= names
    assert {f"decode {batch} x {context}" for batch in TRIAL.batches for context in TRIAL.contexts} <= names
    assert {f"prefill {tokens}" for tokens in TRIAL.prefills} <= names
    assert all(figure.value > 0 and figure.part == precision for figure in report.figures)
    assert [note.part for note in report.skipped] == [f"{precision} with CUDA graphs"]


class WrongOps(ReferenceOps):
    """One operator is a little wrong, one fails."""

    def silu_mul(self, gate_up: Tensor, rounding: Rounding | None = None) -> Activations:
        result = super().silu_mul(gate_up, rounding)
        assert isinstance(result, Tensor)
        result[-1, -1] += 0.5
        return result

    def rope_and_write(self, *arguments: Any) -> Tensor:
        raise ValueError("out of registers")


def test_a_wrong_kernel_and_one_that_fails_are_counted_and_the_others_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = Bench(CPU, torch.float32, TRIAL, WrongOps(), triton=False)
    monkeypatch.setattr(program, "find_bench", lambda *_: wrong)
    path = tmp_path / "gpu.json"

    def here(options: Any, part: str, path: Path, seconds: float) -> None:
        program.run_part(part, TRIAL, CPU, Journal.open(path), lambda: seconds)

    monkeypatch.setattr(program, "_run_child", here)
    assert program.main(["--trial", "--parts", "step", "--json", str(path)]) == 1

    report = read(path)
    by_kind = {
        kind: [each for each in report.kernels if each.name.startswith(kind)] for kind in ("add", "silu", "rope")
    }
    assert all(kernel.passed for kernel in by_kind["add"])
    assert all(not kernel.passed and kernel.error and kernel.seconds for kernel in by_kind["silu"])
    assert all("ValueError: out of registers" in (kernel.fault or "") for kernel in by_kind["rope"])
    assert report.failures == len(by_kind["silu"]) + len(by_kind["rope"]) > 0
    assert capsys.readouterr().out.count("WRONG") == report.failures


def test_a_result_that_is_not_finite_is_no_small_error() -> None:
    assert largest_error([torch.tensor([1.0, torch.nan])], [torch.tensor([1.0, 1.0])]) == torch.inf
    assert largest_error([torch.tensor([0.0, 3.0])], [torch.tensor([0.0, 4.0])]) == pytest.approx(1 / (4 + 8**0.5))


@pytest.mark.parametrize("ending", ["crash", "hang"])
def test_a_part_that_ends_its_process_is_a_fault_and_the_next_one_runs(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def run(command: list[str], timeout: float) -> subprocess.CompletedProcess[bytes]:
        begun.append(command[command.index("--child") + 1])
        if begun[-1] != "attention":
            return subprocess.CompletedProcess(command, 0)
        if ending == "hang":
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, -11)

    monkeypatch.setattr(subprocess, "run", run)
    path = tmp_path / "gpu.json"
    assert program.main(["--trial", "--parts", "attention,fp8", "--json", str(path)]) == 1
    assert begun == ["limits", "attention", "fp8"]
    (fault,) = read(path).faults
    assert fault.part == "attention"
    assert ("-11" if ending == "crash" else "did not end within") in fault.text


@pytest.mark.parametrize("ending", ["crash", "lost device", "hang"])
def test_a_kernel_that_ends_its_process_is_named_and_those_behind_it_are_tried(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = {"crash": -11, "lost device": LOST, "hang": HUNG}

    def run(command: list[str], timeout: float) -> subprocess.CompletedProcess[bytes]:
        if "attention" not in command:
            return subprocess.CompletedProcess(command, 0)
        journal = Journal.open(path)
        for name in ("first", "second", "third"):
            if name in [kernel.name for kernel in journal.report.kernels]:
                continue
            journal.begin(name)
            if name == "second" and ending != "lost device":
                return subprocess.CompletedProcess(command, codes[ending])
            journal.kernel(
                KernelResult(name=name, error=0.0, tolerance=0.0, fault="lost" if name == "second" else None)
            )
            if name == "second":
                return subprocess.CompletedProcess(command, codes[ending])
            journal.end()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    path = tmp_path / "gpu.json"
    assert program.main(["--trial", "--parts", "attention", "--json", str(path)]) == 1
    report = read(path)
    assert [(kernel.name, kernel.passed) for kernel in report.kernels] == [
        ("first", True),
        ("second", False),
        ("third", True),
    ]
    said = {
        "crash": "its process ended with -11",
        "lost device": "lost",
        "hang": f"did not end within {CASE_SECONDS} s",
    }
    assert report.kernels[1].fault == said[ending]
    assert (report.faults, report.trying) == ([], None)


def test_a_kernel_that_breaks_while_it_is_timed_is_not_right() -> None:
    assert not KernelResult(name="", error=0.0, tolerance=0.1, fault="broke when it was timed").passed


def test_without_its_own_fp8_product_the_card_has_limits_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no kernel for this layout")

    monkeypatch.setattr(card_limits, "has_fp8_units", lambda device: True)
    monkeypatch.setattr(card_limits, "_fp8_product", broken)
    report = run_part("limits", tmp_path / "gpu.json")
    assert report.limits is not None
    assert report.limits.fp8_flops_per_second is None
    [fault] = report.faults
    assert fault.part == "limits of FP8"
    assert "no kernel for this layout (test_gpu.py:" in fault.text
    assert "< limits.py:" in fault.text


def test_where_graphs_cannot_be_recorded_the_rest_is_measured_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(bench: EngineBench, *arguments: Any) -> Runner:
        if bench._mode == "graphs":
            raise RuntimeError("operation not permitted when stream is capturing")
        return begin(bench, *arguments)

    begin, done = EngineBench._start, []
    monkeypatch.setattr(EngineBench, "_start", start)
    monkeypatch.setattr(engine_bench, "modes", lambda config: {"eager": config, "graphs": config})
    for what in ("_decode", "_prefill", "_requests"):
        monkeypatch.setattr(EngineBench, what, lambda bench, *_, what=what: done.append((bench._mode, what)))
    report = run_part("bf16", tmp_path / "gpu.json")
    [fault] = report.faults
    assert fault.part == "bf16 graphs warm-up"
    assert done == [("eager", what) for what in ("_decode", "_decode", "_prefill", "_requests")]


def test_what_has_no_time_left_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    assert program.main(["--trial", "--seconds", "1", "--json", str(path)]) == 0
    assert [note.part for note in read(path).skipped] == list(program.PARTS)


def test_without_a_gpu_it_says_so_and_measures_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main([]) == 2
    assert "torch sees no CUDA device here. Nothing was measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("capability", "lacks", "said"),
    [
        ((7, 5), None, "compute capability (7, 5) is older"),
        ((9, 0), "there is no C compiler", "there is no C compiler"),
    ],
)
def test_a_gpu_without_our_kernels_is_not_measured(
    capability: tuple[int, int], lacks: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(program, "triton_lacks", lambda: lacks)
    assert said in (program.find_obstacle() or "")


def test_it_needs_nothing_but_torch_triton_and_msgspec() -> None:
    others = ("click", "rich", "transformers", "grpc", "safetensors", "tokenizers", "jinja2", "pydantic")
    code = f"import sys, bench.gpu.__main__; print([name for name in {others} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_the_limit_of_one_stream_of_nemo_is_its_bytes_over_the_bandwidth() -> None:
    """By hand: projections in e4m3 with a float32 scale per row, the head and the norms in bfloat16; FP8 keys and
    values with a float32 scale per vector."""
    rows = 40 * (6144 + 5120 + 28672 + 5120)
    streamed = 10_905_190_400 + 4 * rows + 2 * 131072 * 5120 + 2 * (2 * 40 + 1) * 5120
    cached = 1024 * 40 * 2 * 8 * (128 + 4)
    work = Arithmetic(FULL.model, SCHEMES["fp8"], "fp8", 2).decode(1, 1024)
    assert work.nbytes == streamed + cached
    assert work.least_seconds(LIMITS) == (streamed + cached) / 4e12


def test_the_limit_of_a_long_prompt_is_its_operations_over_the_peaks() -> None:
    linear = 2 * 10_905_190_400 * 8192
    attention = 4 * 32 * 128 * 40 * 8192 * 8193 / 2
    head = 2 * 131072 * 5120
    eight = Arithmetic(FULL.model, SCHEMES["fp8"], "fp8", 2).prefill(8192, 8192)
    sixteen = Arithmetic(FULL.model, SCHEMES["bf16"], "auto", 2).prefill(8192, 8192)
    assert eight.least_seconds(LIMITS) == pytest.approx(linear / 16e14 + (attention + head) / 8e14)
    assert sixteen.least_seconds(LIMITS) == pytest.approx((linear + attention + head) / 8e14)


@pytest.mark.parametrize("precision", KV_PRECISION)
def test_random_weights_have_the_form_that_the_precision_keeps(precision: str) -> None:
    subject = build(TRIAL, precision, CPU)
    floats = subject.decoder.dtype.itemsize
    vectors = vector_parameters(TRIAL.model) * floats
    assert subject.decoder.weights.nbytes == weight_bytes(TRIAL.model, SCHEMES[precision], floats) - vectors
