"""bench.peers: its workload and arithmetic, what it says of servers that are not there, and one run against ours."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from bench.measure import Facts, Limits, Machine, summarise
from bench.peers import servers
from bench.peers.__main__ import main
from bench.peers.processes import ServerFailedError, answers, family, free_port, peak_bytes, running
from bench.peers.report import CaseRun, Peers, Skipped, Turn, plot, show
from bench.peers.workload import Case, cases

PLAIN = Case(name="plain", streams=2, prompt_tokens=8, new_tokens=4)
SHARED = Case(name="shared prefix", streams=3, prompt_tokens=12, new_tokens=4, shared_tokens=5)


def test_prompts_have_their_lengths_and_share_what_they_shall() -> None:
    prompts = SHARED.prompts(0, 2000)
    assert [len(prompt) for prompt in prompts] == [12] * 3
    assert len({tuple(prompt[:5]) for prompt in prompts}) == 1
    assert len({tuple(prompt[:6]) for prompt in prompts}) > 1
    assert prompts == SHARED.prompts(0, 2000)
    assert prompts != SHARED.prompts(1, 2000)
    assert prompts[0][:5] != SHARED.warm_up().prompts(0, 2000)[0][:5]  # else the warm-up would fill the cache
    assert all(1000 <= token < 2000 for prompt in prompts for token in prompt)


def test_the_workload_has_every_number_of_streams_a_long_prompt_and_a_shared_prefix() -> None:
    found = cases([1, 4, 32], 128, 128, 2048, 1024)
    assert [(case.name, case.streams, case.prompt_tokens, case.shared_tokens) for case in found] == [
        ("plain", 1, 128, 0),
        ("plain", 4, 128, 0),
        ("plain", 32, 128, 0),
        ("long prompt", 1, 2048, 0),
        ("shared prefix", 16, 1088, 1024),
    ]


def turn(server: str, weights: str, bits: int, speed: float, case: Case = PLAIN) -> Turn:
    run = msgspec.structs.replace(summarise([0.0], [[1.0, 1.5]], []), tokens_per_second=speed)
    return Turn(
        server=server,
        weights=weights,
        bits=bits,
        weight_bytes=10**9,
        ready_seconds=1.0,
        peak_rss_bytes=2**20,
        runs=[CaseRun(case=case, run=run)],
    )


@pytest.fixture
def result() -> Peers:
    return Peers(
        started_at="2026-01-01T00:00:00+00:00",
        machine=Machine(cpu="c", cores=1, python="3", system="s", load_average=0.0),
        limits=Limits(copy_bytes_per_second=1e9, read_bytes_per_second=4e9, matrix_flops_per_second=8e9),
        model="m",
        facts=Facts(vocab_size=2000, parameters=10**9, streamed_parameters=5 * 10**8),
        threads=1,
        turns=[
            turn("nemoserve", "int8", 8, 30),
            turn("llama.cpp", "Q8_0", 8, 15),
            turn("llama.cpp", "FILE", 4, 60),
            turn("nemoserve", "int8", 8, 20),
            turn("llama.cpp", "Q8_0", 8, 10),
        ],
        skipped=[Skipped(server="vllm", reason=servers.VLLM)],
    )


def test_each_is_compared_with_the_best_of_as_many_bits(result: Peers) -> None:
    found = result.rival(("nemoserve", "int8"), PLAIN)
    assert found is not None
    assert (found[0], found[1].tokens_per_second) == (("llama.cpp", "Q8_0"), 15)
    console = Console(file=io.StringIO(), width=160)
    show(result, console)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert "30.0 (20.0)" in printed
    assert "2.00x llama.cpp Q8_0, TTFT 1.00x" in printed
    assert "1.0 (25%)" in printed
    assert "skipped vllm: no vllm: install" in printed


def test_the_picture_has_a_bar_for_each(result: Peers) -> None:
    picture = plot(result)
    assert picture.count("<rect x=") == 3
    assert 'width="420.0"' in picture  # of 60 tokens/s
    assert 'width="210.0"' in picture  # of 30


def test_a_result_file_is_read_back(result: Peers) -> None:
    assert msgspec.json.decode(msgspec.json.encode(result), type=Peers) == result


def test_tokens_are_counted_as_each_server_tells_them() -> None:
    assert servers._llama_count({"tokens_predicted": 7}, 5) == 2  # one of them ended no character of its own
    assert servers._llama_count({"error": "x"}, 5) == 0
    assert servers._vllm_count({"choices": [{"token_ids": [1, 2]}]}, 5) == 2
    assert servers._vllm_count({"choices": [], "usage": {}}, 5) == 0


def test_a_server_that_ends_early_is_told_with_its_last_words() -> None:
    script = "print('no such model'); raise SystemExit(3)"
    with (
        pytest.raises(ServerFailedError, match=r"status 3(?s:.*)no such model"),
        running([sys.executable, "-c", script], lambda: False, 30),
    ):
        raise AssertionError("it never was ready")


def test_a_server_is_weighed_with_its_children_and_stopped_with_them(tmp_path: Path) -> None:
    port = free_port()
    script = (
        "import subprocess, sys; "
        "child = subprocess.Popen([sys.executable, '-m', 'http.server', sys.argv[1], '--bind', '127.0.0.1']); "
        "child.wait()"
    )
    url = f"http://127.0.0.1:{port}/"
    with running([sys.executable, "-c", script, str(port)], lambda: answers(url), 30) as pid:
        members = family(pid)
        assert len(members) == 2
        assert peak_bytes(pid) > peak_bytes(members[1]) > 2**20
    assert not answers(url)


def test_ours_answers_every_case_and_who_is_missing_is_named(smollm2_path: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(smollm2_path), "--servers", "nemoserve,llama.cpp,vllm", "--precisions", "auto"]
    arguments += ["--streams", "2", "--prompt-tokens", "4", "--new-tokens", "3", "--long-tokens", "9"]
    arguments += ["--shared-tokens", "6", "--rounds", "1", "--threads", "1", "--folder", str(tmp_path / "weights")]
    done = CliRunner().invoke(main, [*arguments, "--json", str(tmp_path / "r.json")])
    assert done.exit_code == 0, done.output
    found = msgspec.json.decode((tmp_path / "r.json").read_bytes(), type=Peers)
    assert [run.run.tokens for run in found.turns[0].runs] == [2 * 3, 1 * 3, 2 * 3]
    assert {each.server for each in found.skipped} == {"llama.cpp", "vllm"}
    assert (tmp_path / "r.svg").read_text() == plot(found)
