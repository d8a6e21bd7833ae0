"""Neither what is asked nor with which key is ever in the log: a canary goes through every call and every failure."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from nemoserve.v1 import generation_pb2 as pb
from tritonclient.grpc import service_pb2 as triton
from tritonclient.grpc import service_pb2_grpc as triton_rpc

from engine import EngineDeadError
from service.errors import Code, ServiceError
from service.security.access import Access
from service.security.keys import KeysFile
from tests.service.fakes import Answer, FakeHost
from tests.service.grpc.ports import Port, drained, serving

PROMPT, KEY, WRONG = "canary-prompt", "nms-canary-key-0001", "nms-canary-key-0002"


@pytest.fixture
def keys(tmp_path: Path) -> KeysFile:
    file = tmp_path / "keys.yaml"
    file.write_text(f"- {{name: ann, key: {KEY}, admin: true}}\n")
    return KeysFile(file)


class Faulty(FakeHost):
    """Has a fault of ours in it."""

    def token_bytes(self, token_id: int) -> bytes:
        raise LookupError(token_id)


def hosts() -> Iterator[FakeHost]:
    """One that answers, and one for each way to fail."""
    yield FakeHost()
    yield Faulty()
    unavailable = ServiceError(Code.UNAVAILABLE, "down")
    for answer in (
        Answer(error=unavailable),
        Answer(error=unavailable, error_after=1),
        Answer(finished_error="broken", error_after=1),
        Answer(error=EngineDeadError("dead"), error_after=1),  # type: ignore[arg-type]  # which nobody expects there
    ):
        yield FakeHost(answers={PROMPT: answer})


def typed_requests() -> Iterator[pb.GenerateRequest]:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content=PROMPT)])
    few = pb.SamplingParameters(max_tokens=2, logprobs=1)
    yield pb.GenerateRequest(prompt=PROMPT, sampling=few)
    yield pb.GenerateRequest(chat=chat, sampling=few)
    yield pb.GenerateRequest(prompt=PROMPT, sampling=pb.SamplingParameters(temperature=-1))
    yield pb.GenerateRequest(prompt=PROMPT, model=PROMPT)
    yield pb.GenerateRequest(prompt=PROMPT * 500, sampling=few)
    yield pb.GenerateRequest(prompt=PROMPT, request_id=PROMPT * 50)


def kserve_requests() -> Iterator[triton.ModelInferRequest]:
    for model in ("fake", "ensemble", "nobody"):
        for parameters in ({"max_tokens": 2}, {"max_tokens": PROMPT}, {PROMPT: PROMPT}):
            request = triton.ModelInferRequest(model_name=model)
            for name, text in (("text_input", PROMPT), ("sampling_parameters", json.dumps(parameters))):
                tensor = request.inputs.add(name=name, datatype="BYTES", shape=[1])
                tensor.contents.bytes_contents.append(text.encode())
            yield request


async def ask_everything(port: Port, metadata: Any) -> int:
    """How many calls did not end well."""
    kserve, failed = triton_rpc.GRPCInferenceServiceStub(port.channel), 0
    calls = [port.typed.Generate(each, metadata=metadata, timeout=30) for each in typed_requests()]
    calls.append(port.typed.Tokenize(pb.TokenizeRequest(text=PROMPT), metadata=metadata, timeout=30))
    for request in kserve_requests():
        calls.append(kserve.ModelInfer(request, metadata=metadata, timeout=30))
        calls.append(kserve.ModelStreamInfer(iter([request]), metadata=metadata, timeout=30))
    malformed = port.channel.unary_unary("/nemoserve.v1.GenerationService/Tokenize")
    calls.append(malformed(PROMPT.encode(), metadata=metadata, timeout=30))
    for call in calls:
        try:
            await (drained(call) if hasattr(call, "__aiter__") else call)
        except grpc.aio.AioRpcError:
            failed += 1
    return failed


async def test_no_canary_is_ever_heard(keys: KeysFile, caplog: pytest.LogCaptureFixture) -> None:
    failed = 0
    with caplog.at_level(logging.DEBUG):
        for host in hosts():
            async with serving(host, access=Access(keys=keys)) as port:
                for metadata in ((("x-api-key", KEY),), (("authorization", f"Bearer {WRONG}"),), ()):
                    failed += await ask_everything(port, metadata)
    assert failed > 100
    assert {"an RPC failed", "a model failed"} & {record.getMessage() for record in caplog.records}
    for record in caplog.records:
        heard = caplog.handler.format(record) + str(vars(record))
        assert PROMPT not in heard, heard
        assert "nms-" not in heard, heard
