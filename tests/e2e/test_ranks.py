"""A model divided among the processes of one server: SmolLM2-135M has nine heads, so that three ranks can share it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc

from bench.measure import children
from tests.e2e.conftest import ServerProcess
from tests.e2e.test_life import engine_of, serve

RANKS = 3
OPTIONS = ("--dtype", "fp32", "--threads", "1", "--max-batch-size", "4", "--max-model-len", "512")


@pytest.fixture(scope="module")
def divided(smollm2_path: Path) -> Iterator[ServerProcess]:
    ranks = ("--tensor-parallel-size", str(RANKS), "--engine-restarts", "0")
    running = ServerProcess.start(smollm2_path, *ranks, *OPTIONS)
    yield running
    running.kill()


def story(tokens: int) -> pb.GenerateRequest:
    sampling = pb.SamplingParameters(max_tokens=tokens, temperature=0, ignore_eos=True)
    return pb.GenerateRequest(prompt="The capital of France is", sampling=sampling)


def told(server: ServerProcess, tokens: int) -> str:
    with server.channel() as channel:
        events = rpc.GenerationServiceStub(channel).Generate(story(tokens), timeout=120)
        return "".join(event.delta.text for event in events if event.WhichOneof("event") == "delta")


def test_greedy_text_is_that_of_one_device(divided: ServerProcess, exact_server: ServerProcess) -> None:
    expected = told(exact_server, 16)
    assert "Paris" in expected
    assert told(divided, 16) == expected


def test_a_rank_that_dies_ends_the_server_with_its_name(divided: ServerProcess) -> None:
    """The last of the shared server."""
    ranks = children(engine_of(divided))
    assert len(ranks) == RANKS - 1
    with divided.channel() as channel:
        call = rpc.GenerationServiceStub(channel).Generate(story(400), timeout=120)
        next(call)
        os.kill(ranks[0], signal.SIGKILL)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert divided.process.wait(30) == 70
    assert "rank 1 is gone (killed by signal 9)" in "".join(divided.lines)


def test_a_model_that_cannot_be_divided_so_is_refused_in_one_line(smollm2_path: Path) -> None:
    done = serve(smollm2_path, "--tensor-parallel-size", "2")
    assert done.returncode == 1
    assert "tensor_parallel_size: 2 must divide the model's 9 attention heads" in done.stderr
    assert "possible are 1, 3" in done.stderr
    assert "Traceback" not in done.stderr
