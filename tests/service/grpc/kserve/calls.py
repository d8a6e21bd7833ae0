"""Requests as messages, in few words."""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb

DTYPES = {"INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_, "FP16": np.float16}
DATATYPES = {bool: "BOOL", int: "INT32", float: "FP32", str: "BYTES", bytes: "BYTES"}


def packed(*elements: str | bytes) -> bytes:
    """BYTES elements as they go over the wire."""
    raw = [element.encode() if isinstance(element, str) else element for element in elements]
    return b"".join(struct.pack("<I", len(element)) + element for element in raw)


def set_parameters(request: Any, parameters: Mapping[str, object]) -> None:
    fields = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    for key, value in parameters.items():
        setattr(request.parameters[key], fields[type(value)], value)


def add(
    request: pb.ModelInferRequest, name: str, value: Any, *, datatype: str = "", shape: Iterable[int] | None = None
) -> pb.ModelInferRequest:
    """Append a raw input. A value is a scalar, a list of them, or bytes that are the raw content itself if a datatype
    is given."""
    if datatype and isinstance(value, bytes):
        raw, count = value, 1
    else:
        values = value if isinstance(value, list) else [value]
        datatype = datatype or DATATYPES[type(values[0])]
        raw = packed(*values) if datatype == "BYTES" else np.array(values, DTYPES[datatype]).tobytes()
        count = len(values)
    request.inputs.add(name=name, datatype=datatype, shape=[count] if shape is None else shape)
    request.raw_input_contents.append(raw)
    return request


def ask(model: str, *, id: str = "", parameters: Mapping[str, object] | None = None, **inputs: Any) -> Any:
    """A request of scalar or list inputs without batch dimension."""
    request = pb.ModelInferRequest(model_name=model, id=id)
    set_parameters(request, parameters or {})
    for name, value in inputs.items():
        add(request, name, value)
    return request


def vllm(prompt: str | bytes = "hi", *, id: str = "", stream: bool = True, **sampling: Any) -> pb.ModelInferRequest:
    request = ask("vllm_model", id=id, text_input=prompt, stream=stream)
    return add(request, "sampling_parameters", json.dumps(sampling)) if sampling else request


def outputs(response: pb.ModelInferResponse) -> dict[str, Any]:
    """Output tensors as Python lists, texts decoded."""
    made: dict[str, Any] = {}
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if tensor.datatype == "BYTES":
            elements, at = [], 0
            while at < len(raw):
                (length,) = struct.unpack_from("<I", raw, at)
                elements.append(raw[at + 4 : at + 4 + length].decode())
                at += 4 + length
            made[tensor.name] = elements
        else:
            dtype = {"UINT32": np.uint32}.get(tensor.datatype) or DTYPES[tensor.datatype]
            made[tensor.name] = np.frombuffer(raw, dtype).reshape(tensor.shape).tolist()
    return made


def text(response: pb.ModelInferResponse) -> str:
    return "".join(outputs(response).get("text_output", []))


def is_final(response: pb.ModelInferResponse) -> bool:
    return bool(response.parameters["triton_final_response"].bool_param)


async def stream(stub: Any, *requests: pb.ModelInferRequest, **call: Any) -> list[pb.ModelStreamInferResponse]:
    """All messages of a stream that sends the requests and closes its side."""
    return [message async for message in stub.ModelStreamInfer(iter_requests(*requests), **call)]


async def iter_requests(*requests: pb.ModelInferRequest) -> AsyncIterator[pb.ModelInferRequest]:
    for request in requests:
        yield request
