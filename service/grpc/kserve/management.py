"""What a client can ask about the server and its models without an inference: metadata, configuration, statistics,
log and trace settings. Pure translation; the servicer finds the models."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tritonclient.grpc import model_config_pb2, service_pb2

from service.errors import Code, ServiceError
from service.grpc.kserve.model import ModelSpec, TensorSpec
from service.grpc.kserve.tensors import config_type, refused

EXTENSIONS = (
    "model_configuration",
    "statistics",
    "parameters",
    "schedule_policy",
    "model_repository",
    "binary_tensor_data",
    "logging",
    "trace",
)
TRACE_SETTINGS = {
    "trace_file": "",
    "trace_level": "OFF",
    "trace_rate": "1000",
    "trace_count": "-1",
    "log_frequency": "0",
    "trace_mode": "triton",
}
LOG_LEVELS = {
    "log_verbose_level": logging.DEBUG,
    "log_info": logging.INFO,
    "log_warning": logging.WARNING,
    "log_error": logging.ERROR,
}
RUNG = logging.INFO - logging.DEBUG  # from one level to the next


@dataclass(slots=True)
class Duration:
    """How often something happened, and how long it took together."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.ns += round(max(0.0, seconds) * 1e9)


@dataclass(slots=True)
class Statistics:
    """Counters of one model, from the start of the server. Cancelled requests count as failed, as on Triton."""

    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute: Duration = field(default_factory=Duration)
    last_inference_ms: int = 0

    def succeeded(self, seconds: float, queued_seconds: float) -> None:
        self.success.add(seconds)
        self.queue.add(queued_seconds)
        self.compute.add(seconds - queued_seconds)
        self.last_inference_ms = time.time_ns() // 1_000_000

    def failed(self, seconds: float) -> None:
        self.fail.add(seconds)

    def message(self, spec: ModelSpec) -> service_pb2.ModelStatistics:
        statistics = service_pb2.ModelStatistics(
            name=spec.name,
            version=spec.version,
            last_inference=self.last_inference_ms,
            inference_count=self.success.count,
            execution_count=self.success.count,
        )
        inferences = statistics.inference_stats
        # Input and output conversion are part of the computation here: counted, but with no time of their own.
        unmeasured = Duration(self.success.count)
        for name, duration in (
            ("success", self.success),
            ("fail", self.fail),
            ("queue", self.queue),
            ("compute_input", unmeasured),
            ("compute_infer", self.compute),
            ("compute_output", unmeasured),
            ("cache_hit", Duration()),
            ("cache_miss", Duration()),
        ):
            getattr(inferences, name).CopyFrom(service_pb2.StatisticDuration(count=duration.count, ns=duration.ns))
        return statistics


def model_metadata(spec: ModelSpec) -> service_pb2.ModelMetadataResponse:
    """Shapes with the batch dimension, if the model has one."""
    batch = (-1,) if spec.max_batch_size else ()

    def tensors(specs: Iterable[TensorSpec]) -> list[Any]:
        make = service_pb2.ModelMetadataResponse.TensorMetadata
        return [make(name=t.name, datatype=t.datatype, shape=(*batch, *t.dims)) for t in specs]

    return service_pb2.ModelMetadataResponse(
        name=spec.name,
        versions=[spec.version],
        platform=spec.backend,
        inputs=tensors(spec.inputs),
        outputs=tensors(spec.outputs),
    )


def model_config(spec: ModelSpec) -> model_config_pb2.ModelConfig:
    """Shapes without the batch dimension."""
    config = model_config_pb2.ModelConfig(name=spec.name, backend=spec.backend, max_batch_size=spec.max_batch_size)
    config.version_policy.latest.num_versions = 1
    for tensor in spec.inputs:
        config.input.add(
            name=tensor.name, data_type=config_type(tensor.datatype), dims=tensor.dims, optional=tensor.optional
        )
    for tensor in spec.outputs:
        config.output.add(name=tensor.name, data_type=config_type(tensor.datatype), dims=tensor.dims)
    if spec.decoupled:
        config.model_transaction_policy.decoupled = True
    return config


def trace_settings(request: service_pb2.TraceSettingRequest) -> service_pb2.TraceSettingResponse:
    """The settings, which are fixed. Unknown keys are ignored, as by Triton.

    Raises:
        ServiceError: UNIMPLEMENTED for an attempt to change one.
    """
    for key, setting in request.settings.items():
        if key in TRACE_SETTINGS and list(setting.value) not in ([], [TRACE_SETTINGS[key]]):
            raise ServiceError(Code.UNIMPLEMENTED, f"'{key}' cannot be changed: trace settings are read-only")
    response = service_pb2.TraceSettingResponse()
    for key, value in TRACE_SETTINGS.items():
        response.settings[key].value.append(value)
    return response


def log_settings(request: service_pb2.LogSettingsRequest, logger: logging.Logger) -> service_pb2.LogSettingsResponse:
    """Set the logger's level, all or nothing, and tell what holds now. Levels are a ladder: with log_info on, warnings
    and errors are on too. Unknown keys are ignored, as by Triton.

    Raises:
        ServiceError: INVALID_ARGUMENT for a value of the wrong type, UNIMPLEMENTED for what cannot be changed.
    """
    level = _new_level(request, logger)
    if level is not None:
        logger.setLevel(level)
    response = service_pb2.LogSettingsResponse()
    for key, severity in LOG_LEVELS.items():
        if key == "log_verbose_level":
            response.settings[key].uint32_param = int(logger.isEnabledFor(severity))
        else:
            response.settings[key].bool_param = logger.isEnabledFor(severity)
    response.settings["log_file"].string_param = ""
    response.settings["log_format"].string_param = "default"
    return response


def _new_level(request: service_pb2.LogSettingsRequest, logger: logging.Logger) -> int | None:
    """The level that the request asks for, None if it names no level."""
    settings = {key: (value.WhichOneof("parameter_choice"), value) for key, value in request.settings.items()}
    for key, kind, label in (
        ("log_info", "bool_param", "boolean"),
        ("log_warning", "bool_param", "boolean"),
        ("log_error", "bool_param", "boolean"),
        ("log_verbose_level", "uint32_param", "int32"),
        ("log_format", "string_param", "string"),
    ):
        if key in settings and settings[key][0] != kind:
            raise refused(f"expect {label} for '{key}'")
    if "log_file" in settings:
        raise ServiceError(Code.UNIMPLEMENTED, "log file location can not be updated through network protocol")
    if "log_format" in settings and (asked := settings["log_format"][1].string_param) != "default":
        raise refused(f"invalid argument for log_format, got: {asked}")
    wishes = {
        severity: setting.uint32_param > 0 if kind == "uint32_param" else setting.bool_param
        for key, severity in LOG_LEVELS.items()
        if key in settings
        for kind, setting in (settings[key],)
    }
    if not wishes:
        return None
    level = logger.getEffectiveLevel()
    level = max([level, *(severity + RUNG for severity, on in wishes.items() if not on)])
    return min([level, *(severity for severity, on in wishes.items() if on)])
