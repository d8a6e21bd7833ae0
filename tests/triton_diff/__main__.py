"""`make triton-diff`: the same calls to a real Triton and to our servicer over models of the same behaviour.

Prints every difference. One that is meant stands in MEANT with its reason; any other makes the exit code 1.
"""

from __future__ import annotations

import asyncio
import difflib
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from tests.service.grpc.kserve.calls import ask, is_final, iter_requests, outputs
from tests.service.grpc.kserve.conftest import UNLIMITED, serving
from tests.service.grpc.kserve.inference_transcript import ACCEPTED, REFUSED, sums
from tests.service.grpc.kserve.management_transcript import MANAGEMENT
from tests.service.grpc.kserve.test_transcript import transcript
from tests.service.grpc.kserve.toys import comparable
from tests.triton_diff.reference import reference

EMPTY_FINAL = {"triton_enable_empty_final_response": True}
STREAMS = {
    "numbers": [ask("repeat", id="x", count=3)],
    "numbers, the last marked": [ask("repeat", id="x", count=3, tell=True)],
    "numbers, the end asked for": [ask("repeat", id="x", count=3, parameters=EMPTY_FINAL)],
    "numbers, the last marked, the end asked for": [ask("repeat", id="x", count=3, tell=True, parameters=EMPTY_FINAL)],
    "no numbers": [ask("repeat", id="x", count=0)],
    "no numbers, the end asked for": [ask("repeat", id="x", count=0, parameters=EMPTY_FINAL)],
    "an error in between": [ask("repeat", id="x", count=3, fail_at=1)],
    "a model of one response": [ask("echo", id="x", text="hi")],
    "unknown model": [ask("nope", id="x")],
    "missing input": [ask("repeat", id="x", tell=True)],
    "wrong datatype": [ask("repeat", id="x", count=1.5)],
    "an error, then numbers": [ask("failing", id="x", code=0), ask("repeat", id="y", count=1)],
}
NO_SHARED_MEMORY = "there is no shared memory here; Triton 2.51 has it, newer ones only by option"
MEANT = {
    "shared memory, register": NO_SHARED_MEMORY,
    "shared memory, unregister": NO_SHARED_MEMORY,
    "CUDA memory, register": NO_SHARED_MEMORY,
    "CUDA memory, unregister": NO_SHARED_MEMORY,
    "shared memory input": NO_SHARED_MEMORY,
    "shared memory output": NO_SHARED_MEMORY,
    "classification": "we do not have that extension, and say so",
    "trace settings are read-only": "Triton can trace; here tracing is the owner's choice",
    "missing beside an optional one": "Triton counts inputs; we look which are missing",
    "a bug of the model": "exception text never reaches our clients",
    "statistics": "Triton counts the model's errors as successes, and decoupled requests late or not at all",
    "batches differ": "which of the two inputs it names is up to a hash map",
    "stream: missing input": "Triton counts inputs; this model then never answers",
}
# What belongs to the one server or the other and says nothing about behaviour.
NOISE = [
    (re.compile(r" ?(instance_group|dynamic_batching|optimization) \{( [^{}]*(\{[^{}]*\}[^{}]*)*)\}"), ""),
    (re.compile(r' ?default_model_filename: "[^"]*"'), ""),
    (re.compile(r"missing required input\(s\) \]"), "missing required input(s) []"),  # their slip of the pen
    (re.compile(r"Got input\(s\) \[([^]]*)\]"), lambda found: f"Got input(s) {sorted(found[1].split(','))}"),
]
Transcript = dict[str, str]


def normalised(text: str) -> str:
    for pattern, replacement in NOISE:
        text = pattern.sub(replacement, text)
    return text


async def record(address: str) -> Transcript:
    """Everything that the server says, by case."""
    said: Transcript = {}
    async with grpc.aio.insecure_channel(address, options=UNLIMITED) as channel:
        stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        said["statistics"] = await counts(stub)
        calls = {case: (rpc, request) for case, (rpc, request, *_) in MANAGEMENT.items()}
        calls |= {f"infer: {case}": ("ModelInfer", request) for case, (request, *_) in (REFUSED | ACCEPTED).items()}
        calls |= {f"infer: error {code}": ("ModelInfer", ask("failing", code=code)) for code in range(5)}
        calls["infer: a bug of the model"] = ("ModelInfer", ask("failing", code=5))
        for case, (rpc, request) in calls.items():
            code, text = await transcript(stub, rpc, request)
            said[case] = normalised(f"{code.name} {text}")
        for case, requests in STREAMS.items():
            call = stub.ModelStreamInfer(iter_requests(*requests), timeout=20)
            said[f"stream: {case}"] = "\n".join(sorted([told(message) async for message in call]))
    return said


def told(message: pb.ModelStreamInferResponse) -> str:
    """One message of a stream. Errors of the frontend bring no more than the id on Triton; ours all bring the same."""
    response = message.infer_response
    if message.error_message:
        return f"{response.id} error {normalised(message.error_message)}"
    kind = f"{response.model_name}/{response.model_version}"
    return f"{response.id} {kind} {outputs(response)} final={is_final(response)}"


async def counts(stub: Any) -> str:
    """What good, refused and failing requests add to the statistics."""

    async def now() -> dict[str, int]:
        response = await stub.ModelStatistics(pb.ModelStatisticsRequest(), timeout=10)
        return {
            f"{model.name}.{name}": getattr(model.inference_stats, name).count
            for model in response.model_stats
            for name in ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
        }

    before = await now()
    for request in (sums(), sums(), sums(datatype="FP32"), sums(names=("a",)), ask("failing", code=0)):
        await transcript(stub, "ModelInfer", request)
    _ = [m async for m in stub.ModelStreamInfer(iter_requests(ask("repeat", count=3)), timeout=20)]
    after = await now()
    return "\n".join(f"{name} +{after[name] - before[name]}" for name in sorted(after) if after[name] != before[name])


def compare(theirs: Transcript, ours: Transcript, say: Callable[[str], None] = print) -> int:
    """How many differences are not meant."""
    same = unmeant = 0
    for case, expected in theirs.items():
        if ours[case] == expected:
            same += 1
            continue
        reason = MEANT.get(case.removeprefix("infer: "))
        unmeant += reason is None
        say(f"\n{'meant: ' + reason if reason else 'DIFFERENT'}\n  [{case}]")
        lines = difflib.unified_diff(expected.splitlines(), ours[case].splitlines(), "triton", "nemoserve", n=0)
        for line in list(lines)[2:]:
            say(f"  {line}" if not line.startswith("@@") else "")
    say(f"\n{len(theirs)} cases: {same} the same, {len(theirs) - same - unmeant} different on purpose, {unmeant} not")
    return unmeant


async def main() -> int:
    with tempfile.TemporaryDirectory(prefix="triton-diff-") as work, reference(comparable(), Path(work)) as address:
        theirs = await record(address)
        async with serving(comparable()) as running:
            ours = await record(running.address)
    return min(1, compare(theirs, ours))


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
