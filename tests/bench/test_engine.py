"""bench.engine: its arithmetic, and that both peers measure the same model on the same prompts."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import click
import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from bench import engine as program
from bench import fullsize
from bench.measure import Comparison, Facts, Job, Limits, Machine, PeerReport, Run, agreement, percentile, summarise
from tests.tiny_models import write_hf

JOB = Job(
    model="m.gguf", dtype="float32", device="cpu", threads=1, streams=[1, 3], prompt_tokens=20, new_tokens=6, seed=0
)


def test_percentiles_interpolate_between_ranks() -> None:
    values = [4.0, 1.0, 3.0, 2.0]
    assert [percentile(values, p) for p in (0, 50, 95, 100)] == pytest.approx([1.0, 2.5, 3.85, 4.0])
    assert percentile([], 50) == 0.0


def test_a_run_is_summarised_from_the_times_of_its_tokens() -> None:
    run = summarise([10.0, 10.5], [[11.0, 11.2, 11.4], [12.0, 12.1]], [7, 8])
    assert (run.streams, run.tokens, run.first_tokens) == (2, 5, [7, 8])
    assert run.seconds == pytest.approx(2.1)
    assert run.tokens_per_second == pytest.approx(5 / 2.1)
    assert run.ttft_p50_seconds == pytest.approx(1.25)  # 1.0 and 1.5
    assert run.itl_p50_seconds == pytest.approx(0.2)  # 0.2, 0.2 and 0.1


def test_prompts_are_the_same_for_every_peer_and_new_in_every_round() -> None:
    assert JOB.prompts(3, 160) == JOB.prompts(3, 160)
    assert JOB.prompts(3, 160) != msgspec.structs.replace(JOB, seed=1).prompts(3, 160)
    assert {len(prompt) for prompt in JOB.prompts(3, 160)} == {20}


def report(peer: str, *speeds: float) -> PeerReport:
    runs = [
        msgspec.structs.replace(summarise([0.0], [[1.0, 1.5]], [5]), streams=streams, tokens_per_second=speed)
        for streams, speed in zip((1, 3), speeds, strict=True)
    ]
    return PeerReport(
        peer=peer,
        version="1",
        dtype="float32",
        device="cpu",
        weight_bytes=10**9,
        load_seconds=1.0,
        peak_rss_bytes=2**20,
        runs=runs,
    )


@pytest.mark.parametrize("streams", ["", "0", "1,x", "4,-1"])
@pytest.mark.parametrize("main", [program.main, fullsize.main])
def test_numbers_of_streams_that_are_none_are_refused(main: click.Command, streams: str) -> None:
    done = CliRunner().invoke(main, ["--streams", streams])
    assert done.exit_code == 2
    assert f"{streams!r} is no list of positive numbers" in done.output


def test_the_best_round_of_each_peer_is_compared() -> None:
    result = Comparison(
        started_at="2026-01-01T00:00:00+00:00",
        machine=Machine(cpu="c", cores=1, python="3", system="s", load_average=0.0),
        limits=Limits(copy_bytes_per_second=1e9, read_bytes_per_second=4e9, matrix_flops_per_second=8e9),
        facts=Facts(vocab_size=160, parameters=10**9, streamed_parameters=5 * 10**8),
        job=JOB,
        reports=[report("a", 10, 40), report("b", 5, 10), report("a", 30, 20), report("b", 6, 8)],
    )
    assert result.peers() == ["a", "b"]
    assert [result.best("a", streams).tokens_per_second for streams in (1, 3)] == [30, 40]
    console = Console(file=io.StringIO(), width=80)
    program.show(result, console)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert "5.00x" in printed  # 30 / 6
    assert "4.00x" in printed  # 40 / 10
    assert "1.0 (25%)" in printed  # half of 10**9 bytes every 0.5 s, of 4e9
    assert "2 (25%)" in printed  # 2 * 5e8 every 0.5 s for one stream, of 8e9
    assert "6 (75%)" in printed  # for three
    assert msgspec.json.decode(msgspec.json.encode(result), type=Comparison) == result


def test_both_peers_measure_the_same_model(tmp_path: Path) -> None:
    from bench.peers import nemoserve, transformers

    job = msgspec.structs.replace(JOB, model=str(write_hf(tmp_path / "model")))
    ours, theirs = asyncio.run(nemoserve.measure(job)), transformers.measure(job)
    assert ours.weight_bytes == pytest.approx(theirs.weight_bytes, rel=0.01)  # ours leaves out the norms
    for mine, other in zip(ours.runs, theirs.runs, strict=True):
        check_run(mine)
        check_run(other)
        assert agreement(mine.first_tokens, other.first_tokens) == 1.0


def check_run(run: Run) -> None:
    assert run.tokens == run.streams * JOB.new_tokens
    assert 0 < run.ttft_p50_seconds <= run.ttft_p95_seconds <= run.seconds


def test_a_peer_that_fails_ends_the_program_with_its_name() -> None:
    missing = msgspec.structs.replace(JOB, model="/nowhere/m.gguf")
    with pytest.raises(SystemExit, match="nemoserve ended with status 1"):
        program._measure("bench.peers.nemoserve", missing, 60, PeerReport)
