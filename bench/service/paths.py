"""The ways on which a token reaches a client, and what of their messages is text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import msgspec
from nemoserve.v1 import generation_pb2 as typed
from tritonclient.grpc import service_pb2 as kserve

from bench.service.wire import GrpcReader, Reader, SseReader, greeting, grpc_call, http_post

PROMPT = "hello"
LENGTH_BYTES = 4  # before an element of a BYTES tensor


class Path(Protocol):
    """One RPC or route."""

    @property
    def title(self) -> str: ...

    @property
    def http(self) -> bool:
        """It is asked for on the HTTP port."""

    def reader(self) -> Reader: ...

    def open(self) -> bytes:
        """What a connection begins with."""

    def request(self, authority: str, tokens: int, headers: Mapping[str, str]) -> bytes: ...

    def text(self, message: bytes) -> str:
        """Of one message; "" for those that bring none."""


class OverGrpc:
    """What RPCs have in common."""

    http = False

    def reader(self) -> Reader:
        return GrpcReader()

    def open(self) -> bytes:
        return greeting()


@dataclass(frozen=True)
class KServe(OverGrpc):
    """`ModelStreamInfer`, the tensors of Triton's vLLM backend."""

    model: str
    title: str = "ModelStreamInfer"

    def request(self, authority: str, tokens: int, headers: Mapping[str, str]) -> bytes:
        message = kserve.ModelInferRequest(model_name=self.model, id="1")
        sampling = msgspec.json.encode({"max_tokens": tokens, "ignore_eos": True})
        for name, datatype, value in (
            ("text_input", "BYTES", _element(PROMPT.encode())),
            ("stream", "BOOL", b"\x01"),
            ("sampling_parameters", "BYTES", _element(sampling)),
        ):
            message.inputs.add(name=name, datatype=datatype, shape=[1])
            message.raw_input_contents.append(value)
        data: bytes = message.SerializeToString()
        return grpc_call("/inference.GRPCInferenceService/ModelStreamInfer", authority, data, headers)

    def text(self, message: bytes) -> str:
        response = kserve.ModelStreamInferResponse.FromString(message)
        if response.error_message:
            raise RuntimeError(response.error_message)
        contents = response.infer_response.raw_output_contents
        return contents[0][LENGTH_BYTES:].decode() if contents else ""


@dataclass(frozen=True)
class Typed(OverGrpc):
    """`nemoserve.v1.GenerationService/Generate`."""

    title: str = "Generate"

    def request(self, authority: str, tokens: int, headers: Mapping[str, str]) -> bytes:
        sampling = typed.SamplingParameters(max_tokens=tokens, ignore_eos=True)
        message = typed.GenerateRequest(prompt=PROMPT, sampling=sampling).SerializeToString()
        return grpc_call("/nemoserve.v1.GenerationService/Generate", authority, message, headers)

    def text(self, message: bytes) -> str:
        return typed.GenerateResponse.FromString(message).delta.text


@dataclass(frozen=True, slots=True)
class OpenAI:
    """`/v1/completions` as server-sent events."""

    title: str = "SSE"
    http: bool = True

    def reader(self) -> Reader:
        return SseReader()

    def open(self) -> bytes:
        return b""

    def request(self, authority: str, tokens: int, headers: Mapping[str, str]) -> bytes:
        body = {"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "stream": True}
        return http_post("/v1/completions", authority, msgspec.json.encode(body), headers)

    def text(self, message: bytes) -> str:
        if message == b"[DONE]":
            return ""
        event = msgspec.json.decode(message)
        if "choices" not in event:
            raise RuntimeError(message.decode())
        return "".join(choice["text"] for choice in event["choices"])


def _element(value: bytes) -> bytes:
    return len(value).to_bytes(LENGTH_BYTES, "little") + value
