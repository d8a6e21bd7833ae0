"""From a ModelInferRequest to an InferRequest: the checks that Triton makes before a model sees a request, in its order
and its words (core `infer_request.cc`, server `infer_handler.cc`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from tritonclient.grpc import service_pb2

from service.grpc.kserve.model import Array, InferRequest, ModelSpec, Parameter
from service.grpc.kserve.tensors import InputReader, refused

EMPTY_FINAL = "triton_enable_empty_final_response"
VALUE_FIELDS = ("bool_param", "int64_param", "string_param", "double_param")
SHARED_MEMORY = "shared_memory_region"


def parse(
    request: service_pb2.ModelInferRequest, spec: ModelSpec, *, single: bool = False, deadline: float | None = None
) -> InferRequest:
    """Validate and decode. `single` and `deadline` go into the result.

    Raises:
        ServiceError: INVALID_ARGUMENT.
    """
    prefix = f"[request id: {request.id or '<id_unknown>'}] "
    parameters, priority, timeout = _parameters(request)
    raws = _sources(request, spec, prefix)
    outputs = {output.name for output in spec.outputs}
    for output in request.outputs:
        if output.name not in outputs:
            raise refused(f"unexpected inference output '{output.name}' for model '{spec.name}'")
    return InferRequest(
        id=request.id,
        inputs=_inputs(request, spec, prefix, raws),
        parameters=parameters,
        priority=priority,
        timeout=timeout,
        deadline=deadline,
        single=single,
    )


def wants_empty_final(request: service_pb2.ModelInferRequest) -> bool:
    """True if the client asks to be told of the end by a response without outputs, where no other tells it."""
    return EMPTY_FINAL in request.parameters and request.parameters[EMPTY_FINAL].bool_param


def wanted_model(parameters: Mapping[str, Any]) -> str | None:
    """Which model a RepositoryModelLoad of the served model names, None for the one that is served: the parameter
    `model`, or, since Triton's clients send no parameters of one's own, a `config` of
    {"parameters": {"model": {"string_value": NAME}}}.

    Raises:
        ServiceError: INVALID_ARGUMENT, for everything else.
    """
    if unknown := min(parameters.keys() - {"model", "config"}, default=None):
        raise refused(f"unrecognized load parameter '{unknown}'.")
    names = set()
    for key, parameter in parameters.items():
        _check_kind(key, parameter.WhichOneof("parameter_choice"), "string_param")
        names.add(_named_in(parameter.string_param) if key == "config" else parameter.string_param)
    if len(names) > 1:
        raise refused("load parameters 'model' and 'config' name different models")
    return min(names, default=None)


def _named_in(config: str) -> str:
    match _json(config):
        case {"parameters": {"model": {"string_value": str(name)}}} as found if len(found) == 1:
            return name
    raise refused('load parameter \'config\' must be {"parameters": {"model": {"string_value": NAME}}}')


def _json(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None


def _parameters(request: service_pb2.ModelInferRequest) -> tuple[dict[str, Parameter], int, float | None]:
    """Custom parameters, priority, and timeout in seconds."""
    custom: dict[str, Parameter] = {}
    priority = 0
    timeout: float | None = None
    for key, parameter in request.parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        value: Any = getattr(parameter, kind) if kind else None
        if key == "sequence_id":
            _check_kind(key, kind, "int64_param", "string_param")
        elif key in ("sequence_start", "sequence_end", EMPTY_FINAL):
            _check_kind(key, kind, "bool_param")
        elif key == "priority":
            _check_kind(key, kind, "int64_param", "uint64_param")
            if value < 0:
                raise refused("invalid value for 'priority', expected value >= 0.")
            priority = value
        elif key == "timeout":
            _check_kind(key, kind, "int64_param")
            timeout = value / 1e6 if value > 0 else None
        elif key.startswith("triton_"):
            raise refused(
                "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following keys "
                f"starting with 'triton_' are allowed: {EMPTY_FINAL}"
            )
        elif kind not in VALUE_FIELDS:
            raise refused(
                f"invalid value type for '{key}' parameter, expected int64_param, bool_param, or string_param."
            )
        else:
            custom[key] = value
    return custom, priority, timeout


def _check_kind(key: str, kind: str | None, *allowed: str) -> None:
    if kind not in allowed:
        raise refused(f"invalid value type for '{key}' parameter, expected {' or '.join(allowed)}.")


def _sources(request: service_pb2.ModelInferRequest, spec: ModelSpec, prefix: str) -> dict[str, bytes | None]:
    """Raw bytes of each input by name, None for typed contents. Raw contents go to the inputs in order."""
    raws: dict[str, bytes | None] = {}
    seen: set[str] = set()
    for tensor in request.inputs:
        if tensor.name in seen:
            raise refused(f"{prefix}input '{tensor.name}' already exists in request")
        seen.add(tensor.name)
    for index, tensor in enumerate(request.inputs):
        _refuse_shared_memory(tensor, "input", spec.name)
        typed = tensor.HasField("contents")
        if typed and request.raw_input_contents:
            raise refused(
                f"contents field must not be specified when using raw_input_contents for '{tensor.name}' for model "
                f"'{spec.name}'"
            )
        if not typed and index >= len(request.raw_input_contents):
            raise refused(f"unable to find data for input tensor '{tensor.name}' for model '{spec.name}' in request.")
        raws[tensor.name] = None if typed else request.raw_input_contents[index]
    for output in request.outputs:
        _refuse_shared_memory(output, "output", spec.name)
        if "classification" in output.parameters:
            raise refused(f"classification is not supported for output '{output.name}' of model '{spec.name}'")
    return raws


def _refuse_shared_memory(tensor: Any, kind: str, model: str) -> None:
    if SHARED_MEMORY in tensor.parameters:
        raise refused(f"{SHARED_MEMORY} is not supported for {kind} '{tensor.name}' of model '{model}'")


def _inputs(
    request: service_pb2.ModelInferRequest, spec: ModelSpec, prefix: str, raws: dict[str, bytes | None]
) -> dict[str, Array]:
    _check_names(request, spec, prefix, set(raws))
    known = {tensor.name: tensor for tensor in spec.inputs}
    if spec.max_batch_size and not spec.lenient:
        _check_batch(request, spec, prefix)
    reader = InputReader(spec, prefix)
    shapes = {tensor.name: reader.check_shape(tensor, known[tensor.name]) for tensor in request.inputs}
    return {tensor.name: reader.array(tensor, shapes[tensor.name], raws[tensor.name]) for tensor in request.inputs}


def _check_names(request: service_pb2.ModelInferRequest, spec: ModelSpec, prefix: str, given: set[str]) -> None:
    required = [t for t in spec.inputs if not t.optional]
    missing = [
        t.name
        for t in required
        if t.name not in given and not (t.instead and (t.instead in given or t.instead in request.parameters))
    ]
    unknown = next((t.name for t in request.inputs if all(t.name != known.name for known in spec.inputs)), None)
    fits = len(spec.inputs) >= len(given) >= len(required)
    if unknown is not None and fits:
        raise refused(f"unexpected inference input '{unknown}' for model '{spec.name}'")
    if missing or len(given) > len(spec.inputs):
        bounds = f"between {len(required)} and {len(spec.inputs)} "
        expected = f"number of inputs {bounds}" if len(required) < len(spec.inputs) else f"{len(spec.inputs)} inputs "
        raise refused(
            f"{prefix}expected {expected}but got {len(given)} inputs for model '{spec.name}'. Got input(s) "
            f"{_names([t.name for t in request.inputs])}, but missing required input(s) {_names(missing)}. "
            "Please provide all required input(s)."
        )
    if unknown is not None:
        raise refused(f"unexpected inference input '{unknown}' for model '{spec.name}'")


def _check_batch(request: service_pb2.ModelInferRequest, spec: ModelSpec, prefix: str) -> None:
    batch: int | None = None
    for tensor in request.inputs:
        if not tensor.shape:
            raise refused(
                f"{prefix}input '{tensor.name}' has no shape but model requires batch dimension for '{spec.name}'"
            )
        batch = tensor.shape[0] if batch is None else batch
        if tensor.shape[0] != batch:
            raise refused(f"{prefix}input '{tensor.name}' batch size does not match other inputs for '{spec.name}'")
    if batch is not None and batch > spec.max_batch_size:
        raise refused(f"{prefix}inference request batch-size must be <= {spec.max_batch_size} for '{spec.name}'")


def _names(names: list[str]) -> str:
    return "[" + ",".join(f"'{name}'" for name in names) + "]"
