"""Calls that manage a server and its models: code, and the error's text or the response as one line of protobuf text.

Texts are those of Triton 2.51 except where a comment says otherwise; `make triton-diff` asks a real one.
"""

from __future__ import annotations

from typing import Any

from grpc import StatusCode
from tritonclient.grpc import service_pb2 as pb

OK, INVALID, NOT_FOUND, UNIMPLEMENTED, UNAVAILABLE = (
    StatusCode.OK,
    StatusCode.INVALID_ARGUMENT,
    StatusCode.NOT_FOUND,
    StatusCode.UNIMPLEMENTED,
    StatusCode.UNAVAILABLE,
)
BAD_VERSION = (
    "failed to get model version from specified version string 'abc' (details: stol), version should be an integral "
    "value > 0"
)
NO_LOADING = "explicit model load / unload is not allowed if polling is enabled"
NO_SHARED_MEMORY = "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."
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
