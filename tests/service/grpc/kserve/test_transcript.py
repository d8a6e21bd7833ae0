"""What the servicer answers, call by call: code, and the error's text or the response as one line of protobuf text.

Texts are those of Triton 2.51 except where a comment says otherwise; `make triton-diff` asks a real one.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import service_pb2 as pb

from service.errors import Code
from tests.service.grpc.kserve.calls import add, ask, packed
from tests.service.grpc.kserve.conftest import Running, serving
from tests.service.grpc.kserve.toys import comparable

OK, INVALID, NOT_FOUND, UNIMPLEMENTED, UNAVAILABLE, INTERNAL = (
    grpc.StatusCode.OK,
    *(
        grpc.StatusCode[code.name]
        for code in (Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.UNIMPLEMENTED, Code.UNAVAILABLE, Code.INTERNAL)
    ),
)
BAD_VERSION = (
    "failed to get model version from specified version string 'abc' (details: stol), version should be an integral "
    "value > 0"
)
NO_LOADING = "explicit model load / unload is not allowed if polling is enabled"
NO_SHARED_MEMORY = "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."
BATCH_NOTE = (
    " NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended to each "
    "input shape. If you want to specify the full shape including the batch dim in your input dims config, try setting "
    "max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
)
RESERVED = (
    "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following keys starting with "
    "'triton_' are allowed: triton_enable_empty_final_response"
)
TRACE = " ".join(
    f'settings {{ key: "{key}" value {{ value: "{value}" }} }}'
    for key, value in {
        "log_frequency": "0",
        "trace_count": "-1",
        "trace_file": "",
        "trace_level": "OFF",
        "trace_mode": "triton",
        "trace_rate": "1000",
    }.items()
)
SUMS_METADATA = (
    'name: "sums" versions: "1" platform: "python" '
    'inputs { name: "a" datatype: "INT32" shape: -1 shape: 16 } '
    'inputs { name: "b" datatype: "INT32" shape: -1 shape: 16 } '
    'outputs { name: "sum" datatype: "INT32" shape: -1 shape: 16 } '
    'outputs { name: "difference" datatype: "INT32" shape: -1 shape: 16 }'
)
REPEAT_CONFIG = (
    'config { name: "repeat" version_policy { latest { num_versions: 1 } } '
    'input { name: "count" data_type: TYPE_INT32 dims: 1 } '
    'input { name: "tell" data_type: TYPE_BOOL dims: 1 optional: true } '
    'input { name: "fail_at" data_type: TYPE_INT32 dims: 1 optional: true } '
    'output { name: "number" data_type: TYPE_INT32 dims: 1 } '
    'backend: "python" model_transaction_policy { decoupled: true } }'
)


def trace(key: str, value: str) -> Any:
    request = pb.TraceSettingRequest()
    request.settings[key].value.append(value)
    return request


def log(key: str, **value: Any) -> Any:
    request = pb.LogSettingsRequest()
    request.settings[key].CopyFrom(pb.LogSettingsRequest.SettingValue(**value))
    return request


def load(**parameters: str) -> Any:
    request = pb.RepositoryModelLoadRequest(model_name="sums")
    for key, value in parameters.items():
        request.parameters[key].string_param = value
    return request


MANAGEMENT = {
    "a server lives": ("ServerLive", pb.ServerLiveRequest(), OK, "live: true"),
    "all models ready": ("ServerReady", pb.ServerReadyRequest(), OK, "ready: true"),
    "a known model is ready": ("ModelReady", pb.ModelReadyRequest(name="sums"), OK, "ready: true"),
    "also by version": ("ModelReady", pb.ModelReadyRequest(name="sums", version="1"), OK, "ready: true"),
    "not in another version": ("ModelReady", pb.ModelReadyRequest(name="sums", version="7"), OK, ""),
    "an unknown model is not ready": ("ModelReady", pb.ModelReadyRequest(name="nope"), OK, ""),
    "nor is the empty name": ("ModelReady", pb.ModelReadyRequest(), OK, ""),
    "a version is a number": ("ModelReady", pb.ModelReadyRequest(name="sums", version="abc"), INVALID, BAD_VERSION),
    "metadata": ("ModelMetadata", pb.ModelMetadataRequest(name="sums"), OK, SUMS_METADATA),
    "metadata, unknown model": (
        "ModelMetadata",
        pb.ModelMetadataRequest(name="nope"),
        NOT_FOUND,
        "Request for unknown model: 'nope' is not found",
    ),
    "metadata, unknown version": (
        "ModelMetadata",
        pb.ModelMetadataRequest(name="sums", version="7"),
        NOT_FOUND,
        "Request for unknown model: 'sums' version 7 is not found",
    ),
    "config": ("ModelConfig", pb.ModelConfigRequest(name="repeat"), OK, REPEAT_CONFIG),
    "config, unknown model": (
        "ModelConfig",
        pb.ModelConfigRequest(name="nope"),
        NOT_FOUND,
        "Request for unknown model: 'nope' is not found",
    ),
    "statistics, unknown model": (
        "ModelStatistics",
        pb.ModelStatisticsRequest(name="nope"),
        INVALID,
        "requested model 'nope' is not available",
    ),
    "statistics, unknown version": (
        "ModelStatistics",
        pb.ModelStatisticsRequest(name="sums", version="9"),
        INVALID,
        "requested model version is not available for model 'sums'",
    ),
    "index": (
        "RepositoryIndex",
        pb.RepositoryIndexRequest(),
        OK,
        " ".join(
            f'models {{ name: "{name}" version: "1" state: "READY" }}'
            for name in ("echo", "failing", "optional", "repeat", "sums")
        ),
    ),
    "index of one repository": (
        "RepositoryIndex",
        pb.RepositoryIndexRequest(repository_name="x"),
        UNIMPLEMENTED,
        "'repository_name' specification is not supported",
    ),
    "load": ("RepositoryModelLoad", load(), UNAVAILABLE, NO_LOADING),
    "load with a config": ("RepositoryModelLoad", load(config="{}"), UNAVAILABLE, NO_LOADING),
    "load with a bad parameter": (
        "RepositoryModelLoad",
        load(weird="x"),
        INVALID,
        "unrecognized load parameter 'weird'.",
    ),
    "unload": ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="sums"), UNAVAILABLE, NO_LOADING),
    "shared memory": ("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest(), OK, ""),
    "shared memory, unknown region": (
        "SystemSharedMemoryStatus",
        pb.SystemSharedMemoryStatusRequest(name="x"),
        NOT_FOUND,
        "Unable to find system shared memory region: 'x'",
    ),
    # As Triton since April 2026: off unless its owner turns it on.
    "shared memory, register": (
        "SystemSharedMemoryRegister",
        pb.SystemSharedMemoryRegisterRequest(name="x", key="/x", byte_size=64),
        UNIMPLEMENTED,
        NO_SHARED_MEMORY,
    ),
    "shared memory, unregister": (
        "SystemSharedMemoryUnregister",
        pb.SystemSharedMemoryUnregisterRequest(),
        UNIMPLEMENTED,
        NO_SHARED_MEMORY,
    ),
    "CUDA memory": ("CudaSharedMemoryStatus", pb.CudaSharedMemoryStatusRequest(), OK, ""),
    "CUDA memory, unknown region": (
        "CudaSharedMemoryStatus",
        pb.CudaSharedMemoryStatusRequest(name="x"),
        NOT_FOUND,
        "Unable to find cuda shared memory region: 'x'",
    ),
    "CUDA memory, register": (
        "CudaSharedMemoryRegister",
        pb.CudaSharedMemoryRegisterRequest(name="x", raw_handle=b"0" * 64, byte_size=64),
        UNIMPLEMENTED,
        NO_SHARED_MEMORY,
    ),
    "CUDA memory, unregister": (
        "CudaSharedMemoryUnregister",
        pb.CudaSharedMemoryUnregisterRequest(),
        UNIMPLEMENTED,
        NO_SHARED_MEMORY,
    ),
    "trace settings": ("TraceSetting", pb.TraceSettingRequest(), OK, TRACE),
    "trace settings, unknown model": (
        "TraceSetting",
        pb.TraceSettingRequest(model_name="nope"),
        INVALID,
        "Request for unknown model : nope",
    ),
    "trace settings, unknown key": ("TraceSetting", trace("bogus", "1"), OK, TRACE),
    # Ours: Triton can trace.
    "trace settings are read-only": (
        "TraceSetting",
        trace("trace_rate", "5"),
        UNIMPLEMENTED,
        "'trace_rate' cannot be changed: trace settings are read-only",
    ),
    "log level of a wrong type": (
        "LogSettings",
        log("log_info", string_param="yes"),
        INVALID,
        "expect boolean for 'log_info'",
    ),
    "log verbosity of a wrong type": (
        "LogSettings",
        log("log_verbose_level", bool_param=True),
        INVALID,
        "expect int32 for 'log_verbose_level'",
    ),
    "log format": (
        "LogSettings",
        log("log_format", string_param="zzz"),
        INVALID,
        "invalid argument for log_format, got: zzz",
    ),
    "log file": (
        "LogSettings",
        log("log_file", string_param="/etc/passwd"),
        UNIMPLEMENTED,
        "log file location can not be updated through network protocol",
    ),
}


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


@pytest.fixture
async def toys() -> AsyncIterator[Running]:
    async with serving(comparable(), server_version="1.2.3") as running:
        yield running


async def transcript(stub: Any, rpc: str, request: Any) -> tuple[grpc.StatusCode, str]:
    """The call's code, and its error or response in text."""
    try:
        response = await getattr(stub, rpc)(request, timeout=10)
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return OK, text_format.MessageToString(response, as_one_line=True)


async def test_management_calls_answer_as_the_table_says(toys: Running) -> None:
    for case, (rpc, request, code, text) in MANAGEMENT.items():
        assert (case, await transcript(toys.stub, rpc, request)) == (case, (code, text))


async def test_bad_inference_requests_are_refused_as_the_table_says(toys: Running) -> None:
    for case, (request, code, text) in REFUSED.items():
        assert (case, await transcript(toys.stub, "ModelInfer", request)) == (case, (code, text))


async def test_good_inference_requests_are_answered_as_the_table_says(toys: Running) -> None:
    for case, (request, text) in ACCEPTED.items():
        response = await toys.stub.ModelInfer(request, timeout=10)
        response.ClearField("raw_output_contents")
        assert (case, text_format.MessageToString(response, as_one_line=True)) == (case, text)


async def test_output_data_is_raw(toys: Running) -> None:
    response = await toys.stub.ModelInfer(sums(outputs=("sum",)))
    assert response.raw_output_contents == [SUM.tobytes()]
    response = await toys.stub.ModelInfer(echo(packed("é", b"\xff"), 2))
    assert response.raw_output_contents == [packed("é", b"\xff")]


async def test_server_metadata_names_only_what_is_served(toys: Running) -> None:
    metadata = await toys.stub.ServerMetadata(pb.ServerMetadataRequest())
    assert (metadata.name, metadata.version) == ("nemoserve", "1.2.3")
    assert {"system_shared_memory", "cuda_shared_memory", "sequence"}.isdisjoint(metadata.extensions)


async def test_a_bug_of_a_model_is_told_by_an_id_only(toys: Running) -> None:
    code, text = await transcript(toys.stub, "ModelInfer", ask("failing", code=5))
    assert code is INTERNAL
    assert text.startswith("internal error ")
    assert "secret" not in text
