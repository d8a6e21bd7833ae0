"""Requests of inference, good and bad: code, and the error's text or the response as one line of protobuf text.

Texts are those of Triton 2.51 except where a comment says otherwise; `make triton-diff` asks a real one.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from tests.service.grpc.kserve.calls import add, ask, packed
from tests.service.grpc.kserve.management_transcript import BAD_VERSION, INVALID, NOT_FOUND, UNAVAILABLE, UNIMPLEMENTED

BATCH_NOTE = (
    " NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended to each "
    "input shape. If you want to specify the full shape including the batch dim in your input dims config, try setting "
    "max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
)
RESERVED = (
    "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following keys starting with "
    "'triton_' are allowed: triton_enable_empty_final_response"
)


def sums(
    *,
    id: str = "q",
    model: str = "sums",
    version: str = "",
    names: tuple[str, ...] = ("a", "b"),
    shape: tuple[int, ...] = (1, 16),
    datatype: str = "INT32",
    raw: bytes = np.arange(16, dtype=np.int32).tobytes(),
    outputs: tuple[str, ...] = (),
) -> Any:
    """A request to `sums`; with no arguments, a good one. `datatype`, `shape` and `raw` are those of the last input."""
    request = pb.ModelInferRequest(model_name=model, model_version=version, id=id)
    good = np.arange(16, dtype=np.int32).tobytes()
    for name in names[:-1]:
        add(request, name, good, datatype="INT32", shape=(1, 16))
    for name in names[-1:]:
        add(request, name, raw, datatype=datatype, shape=shape)
    for name in outputs:
        request.outputs.add(name=name)
    return request


def typed(name: str, values: list[Any], *, field: str = "int_contents") -> Any:
    """A request to `echo` with typed contents."""
    request = pb.ModelInferRequest(model_name="echo", id="q")
    tensor = request.inputs.add(name=name, datatype="BYTES", shape=[len(values)])
    getattr(tensor.contents, field).extend(values)
    return request


def both_kinds() -> Any:
    request = sums()
    request.inputs[0].contents.int_contents.extend(range(16))
    return request


def echo(raw: bytes, count: int = 1) -> Any:
    return add(pb.ModelInferRequest(model_name="echo", id="q"), "text", raw, datatype="BYTES", shape=[count])


def without_data() -> Any:
    request = sums()
    del request.raw_input_contents[1:]
    return request


def on(request: Any, where: Any, key: str) -> Any:
    where(request).parameters[key].string_param = "x"
    return request


def with_parameter(key: str, field: str | None, value: Any = None) -> Any:
    request = sums()
    if field is None:
        request.parameters[key].SetInParent()
    else:
        setattr(request.parameters[key], field, value)
    return request


def wrong_kind(key: str, *kinds: str) -> str:
    return f"invalid value type for '{key}' parameter, expected {' or '.join(kinds)}."


CUSTOM_KIND = "invalid value type for 'x' parameter, expected int64_param, bool_param, or string_param."
MISSING = (
    "[request id: q] expected 2 inputs but got {} inputs for model 'sums'. Got input(s) [{}], but missing required "
    "input(s) [{}]. Please provide all required input(s)."
)
REFUSED = {
    "unknown model": (sums(model="nope"), NOT_FOUND, "Request for unknown model: 'nope' is not found"),
    "empty name": (sums(model=""), NOT_FOUND, "Request for unknown model: '' is not found"),
    "unknown version": (sums(version="9"), NOT_FOUND, "Request for unknown model: 'sums' version 9 is not found"),
    "version no number": (sums(version="abc"), INVALID, BAD_VERSION),
    "raw and typed": (
        both_kinds(),
        INVALID,
        "contents field must not be specified when using raw_input_contents for 'a' for model 'sums'",
    ),
    "no data": (without_data(), INVALID, "unable to find data for input tensor 'b' for model 'sums' in request."),
    "missing input": (sums(names=("a",)), INVALID, MISSING.format(1, "'a'", "'b'")),
    "no input": (sums(names=()), INVALID, MISSING.format(0, "", "'a','b'")),
    "too many inputs": (sums(names=("a", "b", "c")), INVALID, MISSING.format(3, "'a','b','c'", "")),
    "missing beside an optional one": (
        ask("optional", id="q", may=1),
        INVALID,
        # Ours: Triton counts only, and lets this reach the model.
        "[request id: q] expected number of inputs between 1 and 2 but got 1 inputs for model 'optional'. Got input(s) "
        "['may'], but missing required input(s) ['must']. Please provide all required input(s).",
    ),
    "twice the same": (sums(names=("a", "a")), INVALID, "[request id: q] input 'a' already exists in request"),
    "unknown input": (sums(names=("a", "foo")), INVALID, "unexpected inference input 'foo' for model 'sums'"),
    "datatype": (
        sums(datatype="FP32"),
        INVALID,
        "[request id: q] inference input 'b' data-type is 'FP32', but model 'sums' expects 'INT32'",
    ),
    "no datatype at all": (
        sums(datatype="FOO"),
        INVALID,
        "[request id: q] inference input 'b' data-type is '<invalid>', but model 'sums' expects 'INT32'",
    ),
    "shape": (
        sums(shape=(1, 15), raw=b"\0" * 60),
        INVALID,
        "[request id: q] unexpected shape for input 'b' for model 'sums'. Expected [-1,16], got [1,15]." + BATCH_NOTE,
    ),
    "shape without batch dimension": (
        ask("optional", id="q", must=[1, 2]),
        INVALID,
        "[request id: q] unexpected shape for input 'must' for model 'optional'. Expected [1], got [2]. ",
    ),
    "shape with a hole": (
        sums(shape=(1, -1)),
        INVALID,
        "[request id: q] All input dimensions should be specified for input 'b' for model 'sums', got [1,-1]",
    ),
    "no id": (
        sums(id="", datatype="FP32"),
        INVALID,
        "[request id: <id_unknown>] inference input 'b' data-type is 'FP32', but model 'sums' expects 'INT32'",
    ),
    "batches differ": (
        sums(shape=(2, 16), raw=b"\0" * 128),
        INVALID,
        "[request id: q] input 'b' batch size does not match other inputs for 'sums'",
    ),
    "batch too large": (
        add(sums(names=("a",), shape=(9, 16)), "b", b"", datatype="INT32", shape=(9, 16)),
        INVALID,
        "[request id: q] inference request batch-size must be <= 8 for 'sums'",
    ),
    "too few bytes": (
        sums(raw=b"\0" * 60),
        INVALID,
        "[request id: q] input byte size mismatch for input 'b' for model 'sums'. Expected 64, got 60",
    ),
    "unknown output": (sums(outputs=("zz",)), INVALID, "unexpected inference output 'zz' for model 'sums'"),
    "typed contents of another type": (
        typed("text", [4]),
        INVALID,
        "unexpected explicit tensor data for input tensor 'text' for model 'echo' of type 'INT32', expected datatype "
        "'BYTES'",
    ),
    "text cut off": (
        echo(packed("hi")[:-1]),
        INVALID,
        "incomplete string data for inference input 'text', expecting string of length 2 but only 1 bytes available",
    ),
    "length cut off": (
        echo(b"\1\0"),
        INVALID,
        "[request id: q] incomplete string length indicator for inference input 'text' for model 'echo', expecting 4 "
        "bytes but only 2 bytes available. Please make sure the string length indicator is in one buffer.",
    ),
    "a length of 4 GiB": (
        echo(struct.pack("<I", 2**32 - 1)),
        INVALID,
        "incomplete string data for inference input 'text', expecting string of length 4294967295 but only 0 bytes "
        "available",
    ),
    "more texts than the shape": (
        echo(packed("a", "b")),
        INVALID,
        "[request id: q] unexpected number of string elements 2 for inference input 'text' for model 'echo', "
        "expecting 1",
    ),
    "fewer texts than the shape": (
        echo(packed("a"), 2),
        INVALID,
        "[request id: q] expected 2 string elements for inference input 'text' for model 'echo', got 1",
    ),
    # Ours: there is no shared memory.
    "shared memory input": (
        on(sums(), lambda request: request.inputs[0], "shared_memory_region"),
        INVALID,
        "shared_memory_region is not supported for input 'a' of model 'sums'",
    ),
    "shared memory output": (
        on(sums(outputs=("sum",)), lambda request: request.outputs[0], "shared_memory_region"),
        INVALID,
        "shared_memory_region is not supported for output 'sum' of model 'sums'",
    ),
    "classification": (
        on(sums(outputs=("sum",)), lambda request: request.outputs[0], "classification"),
        INVALID,
        "classification is not supported for output 'sum' of model 'sums'",
    ),
    "parameter of no type": (with_parameter("x", None), INVALID, CUSTOM_KIND),
    "parameter of uint64": (with_parameter("x", "uint64_param", 1), INVALID, CUSTOM_KIND),
    "reserved parameter": (with_parameter("triton_x", "bool_param", True), INVALID, RESERVED),
    "reserved answer": (with_parameter("triton_final_response", "bool_param", True), INVALID, RESERVED),
    "priority as text": (
        with_parameter("priority", "string_param", "1"),
        INVALID,
        wrong_kind("priority", "int64_param", "uint64_param"),
    ),
    "priority below 0": (
        with_parameter("priority", "int64_param", -1),
        INVALID,
        "invalid value for 'priority', expected value >= 0.",
    ),
    "timeout as text": (with_parameter("timeout", "string_param", "1"), INVALID, wrong_kind("timeout", "int64_param")),
    "sequence id as bool": (
        with_parameter("sequence_id", "bool_param", True),
        INVALID,
        wrong_kind("sequence_id", "int64_param", "string_param"),
    ),
    "sequence start as text": (
        with_parameter("sequence_start", "string_param", "x"),
        INVALID,
        wrong_kind("sequence_start", "bool_param"),
    ),
    "empty final as text": (
        with_parameter("triton_enable_empty_final_response", "string_param", "x"),
        INVALID,
        wrong_kind("triton_enable_empty_final_response", "bool_param"),
    ),
    "an error of the model": (ask("failing", code=3), UNAVAILABLE, "refused for reason 3"),
    "a decoupled model": (
        ask("repeat", count=1),
        UNIMPLEMENTED,
        "ModelInfer RPC doesn't support models with decoupled transaction policy",
    ),
}

SUM = np.arange(16, dtype=np.int32) * 2
BOTH = (
    'outputs { name: "sum" datatype: "INT32" shape: 1 shape: 16 } '
    'outputs { name: "difference" datatype: "INT32" shape: 1 shape: 16 }'
)
HEAD = 'model_name: "sums" model_version: "1" id: "q" '
ACCEPTED = {
    "raw contents": (sums(), HEAD + BOTH),
    "by version": (sums(version="1"), HEAD + BOTH),
    "one output": (sums(outputs=("sum",)), HEAD + BOTH.split(" outputs")[0]),
    "outputs come in the model's order": (sums(outputs=("difference", "sum")), HEAD + BOTH),
    "custom parameters": (with_parameter("x", "double_param", 1.5), HEAD + BOTH),
    "priority": (with_parameter("priority", "uint64_param", 1), HEAD + BOTH),
    "a sequence id is no matter": (with_parameter("sequence_id", "int64_param", 5), HEAD + BOTH),
    "typed texts": (
        typed("text", [b"hi", b""], field="bytes_contents"),
        'model_name: "echo" model_version: "1" id: "q" outputs { name: "text" datatype: "BYTES" shape: 2 }',
    ),
    "bytes that are no text": (
        echo(packed(b"\xff\x00")),
        'model_name: "echo" model_version: "1" id: "q" outputs { name: "text" datatype: "BYTES" shape: 1 }',
    ),
    "no texts": (
        echo(b"", 0),
        'model_name: "echo" model_version: "1" id: "q" outputs { name: "text" datatype: "BYTES" shape: 0 }',
    ),
}
