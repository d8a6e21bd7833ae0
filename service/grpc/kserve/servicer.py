"""The twenty RPCs of `inference.GRPCInferenceService` over any models. Thin: parsing, tensors, management answers and
streams live in the modules beside this one.

Two refinements of Triton's behaviour: ModelInfer also serves decoupled models where there is exactly one response, and
ServerLive answers while the server is draining.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial, wraps
from typing import Any, TypeVar

import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from service.errors import Code, ServiceError
from service.grpc.kserve.management import (
    EXTENSIONS,
    Statistics,
    log_settings,
    model_config,
    model_metadata,
    trace_settings,
)
from service.grpc.kserve.model import READY, UNAVAILABLE, Control, InferResult, Model, Repository
from service.grpc.kserve.requests import parse, wanted_model, wants_empty_final
from service.grpc.kserve.responses import FINAL, Responses, response
from service.grpc.kserve.stream import Stream
from service.grpc.kserve.tensors import refused
from service.grpc.status import Context, abort, deadline_of, metadata_value
from service.names import is_request_id
from service.version import VERSION

log = logging.getLogger(__name__)

NO_LOADING = "explicit model load / unload is not allowed if polling is enabled"
NO_REPOSITORY = "'repository_name' specification is not supported"
NO_STREAMING = "ModelInfer RPC doesn't support models with decoupled transaction policy"
NO_SHARED_MEMORY = "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."

Response = TypeVar("Response")


def unary(
    handler: Callable[[KServeServicer, Any], Response],
) -> Callable[[KServeServicer, Any, Context], Awaitable[Response]]:
    """An RPC from a plain function: ServiceErrors become statuses."""

    @wraps(handler)
    async def answer(self: KServeServicer, request: Any, context: Context) -> Response:
        try:
            return handler(self, request)
        except ServiceError as error:
            await abort(context, error)

    return answer


class KServeServicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Serves each model under its own name.

    Args:
        repository: further models, which clients may load and unload. A model of the same name goes first.
        control: loads and unloads what all of `models` are names of; None if clients may not.
        server_name: what ServerMetadata tells; some clients insist on "triton".
        logger: whose level LogSettings reads and sets; None = the logger of the whole service.
    """

    def __init__(
        self,
        models: Sequence[Model],
        repository: Repository | None = None,
        control: Control | None = None,
        server_name: str = "nemoserve",
        server_version: str = VERSION,
        logger: logging.Logger | None = None,
    ) -> None:
        self._fixed = {model.spec.name: model for model in models}
        self._repository = repository
        self._control = control
        self._statistics: defaultdict[str, Statistics] = defaultdict(Statistics)
        self._server = pb.ServerMetadataResponse(name=server_name, version=server_version, extensions=EXTENSIONS)
        self._logger = logger if logger is not None else logging.getLogger("service")

    # -- the server --------------------------------------------------------------------------------------------

    @unary
    def ServerLive(self, request: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    @unary
    def ServerReady(self, request: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=all(model.state[0] == READY for model in self._fixed.values()))

    @unary
    def ServerMetadata(self, request: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        return self._server

    @unary
    def TraceSetting(self, request: pb.TraceSettingRequest) -> pb.TraceSettingResponse:
        if request.model_name and self._named(request.model_name) is None:
            raise refused(f"Request for unknown model : {request.model_name}")
        return trace_settings(request)

    @unary
    def LogSettings(self, request: pb.LogSettingsRequest) -> pb.LogSettingsResponse:
        return log_settings(request, self._logger)

    # -- its models --------------------------------------------------------------------------------------------

    @unary
    def ModelReady(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        try:
            model = self._find(request.name, request.version)
        except ServiceError as error:
            if error.code is Code.NOT_FOUND:
                return pb.ModelReadyResponse(ready=False)
            raise
        return pb.ModelReadyResponse(ready=model.state[0] == READY)

    @unary
    def ModelMetadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        return model_metadata(self._find(request.name, request.version).spec)

    @unary
    def ModelConfig(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        return pb.ModelConfigResponse(config=model_config(self._find(request.name, request.version).spec))

    @unary
    def ModelStatistics(self, request: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
        models = self._models()
        if request.name:
            if request.name not in models:
                raise refused(f"requested model '{request.name}' is not available")
            if request.version not in ("", models[request.name].spec.version):
                _check_version(request.version)
                raise refused(f"requested model version is not available for model '{request.name}'")
            models = {request.name: models[request.name]}
        return pb.ModelStatisticsResponse(
            model_stats=[self._statistics[name].message(model.spec) for name, model in sorted(models.items())]
        )

    @unary
    def RepositoryIndex(self, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        if request.repository_name:
            raise ServiceError(Code.UNIMPLEMENTED, NO_REPOSITORY)
        response = pb.RepositoryIndexResponse()
        models = self._models()
        found = [(name, model.spec.version, *model.state) for name, model in models.items()]
        if self._repository is not None:
            absent = self._repository.absent()
            found += [(name, "", UNAVAILABLE, reason) for name, reason in absent.items() if name not in models]
        for name, version, state, reason in sorted(found):
            if state == READY or not request.ready:
                response.models.add(name=name, version=version, state=state, reason=reason)
        return response

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        try:
            if (control := self._control_of(request.repository_name, request.model_name)) is not None:
                await control.load(wanted_model(request.parameters))
                return pb.RepositoryModelLoadResponse()
            unknown = next((key for key in request.parameters if key != "config" and not key.startswith("file:")), None)
            if not request.repository_name and unknown is not None:
                raise refused(f"unrecognized load parameter '{unknown}'.")
            repository = self._changeable(request.repository_name, request.model_name)
            if request.parameters:
                raise refused(f"load parameter '{min(request.parameters)}' is not supported: models are loaded as is")
            await repository.load(request.model_name)
            return pb.RepositoryModelLoadResponse()
        except ServiceError as error:
            await abort(context, error)

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        try:
            if (control := self._control_of(request.repository_name, request.model_name)) is not None:
                await control.unload()
            else:
                await self._changeable(request.repository_name, request.model_name).unload(request.model_name)
            return pb.RepositoryModelUnloadResponse()
        except ServiceError as error:
            await abort(context, error)

    def _control_of(self, repository_name: str, model_name: str) -> Control | None:
        """What loads and unloads the served model, if that is meant and clients may."""
        return self._control if not repository_name and model_name in self._fixed else None

    def _changeable(self, repository_name: str, model_name: str) -> Repository:
        """The repository, if the model can be loaded and unloaded.

        Raises:
            ServiceError: in Triton's words where it would refuse too.
        """
        if repository_name:
            raise ServiceError(Code.UNIMPLEMENTED, NO_REPOSITORY)
        if self._repository is None:
            raise ServiceError(Code.UNAVAILABLE, NO_LOADING)
        if model_name in self._fixed:
            raise refused(f"model '{model_name}' is there as long as the server; only LoRA adapters come and go")
        return self._repository

    # -- shared memory: none -----------------------------------------------------------------------------------

    @unary
    def SystemSharedMemoryStatus(
        self, request: pb.SystemSharedMemoryStatusRequest
    ) -> pb.SystemSharedMemoryStatusResponse:
        _check_region("system", request.name)
        return pb.SystemSharedMemoryStatusResponse()

    @unary
    def CudaSharedMemoryStatus(self, request: pb.CudaSharedMemoryStatusRequest) -> pb.CudaSharedMemoryStatusResponse:
        _check_region("cuda", request.name)
        return pb.CudaSharedMemoryStatusResponse()

    @unary
    def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest
    ) -> pb.SystemSharedMemoryRegisterResponse:
        raise ServiceError(Code.UNIMPLEMENTED, NO_SHARED_MEMORY)

    @unary
    def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        raise ServiceError(Code.UNIMPLEMENTED, NO_SHARED_MEMORY)

    @unary
    def CudaSharedMemoryRegister(
        self, request: pb.CudaSharedMemoryRegisterRequest
    ) -> pb.CudaSharedMemoryRegisterResponse:
        raise ServiceError(Code.UNIMPLEMENTED, NO_SHARED_MEMORY)

    @unary
    def CudaSharedMemoryUnregister(
        self, request: pb.CudaSharedMemoryUnregisterRequest
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        raise ServiceError(Code.UNIMPLEMENTED, NO_SHARED_MEMORY)

    # -- inference ---------------------------------------------------------------------------------------------

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        _echo_request_id(context)
        try:
            model = self._find(request.model_name, request.model_version)
            async with aclosing(self._results(model, request, deadline_of(context), single=True)) as results:
                async for result in results:
                    return response(model.spec, request, result)
            return response(model.spec, request, InferResult(outputs={}))
        except ServiceError as error:
            await abort(context, error)

    async def ModelStreamInfer(self, request_iterator: AsyncIterator[pb.ModelInferRequest], context: Context) -> None:
        _echo_request_id(context)
        models = list(self._fixed.values())
        try:
            if models and not any(model.accepts for model in models):
                raise ServiceError(Code.UNAVAILABLE, models[0].state[1])
            strict = metadata_value(context, "triton_grpc_error") == "true"
            respond = partial(self._responses, deadline=deadline_of(context))
            await Stream(context, respond, strict=strict).run(request_iterator)
        except ServiceError as error:
            await abort(context, error)

    async def _responses(
        self, request: pb.ModelInferRequest, deadline: float | None
    ) -> AsyncGenerator[pb.ModelStreamInferResponse]:
        """All responses to one request of a stream, each with its final flag; each is there until the next one."""
        final = False
        model = self._find(request.model_name, request.model_version)  # once: it may be unloaded on the way
        responses = Responses(model.spec, request, flagged=True)
        async with aclosing(self._results(model, request, deadline, single=False)) as results:
            async for result in results:
                final = result.final
                yield responses.message(result)
        if not final and wants_empty_final(request):
            message = pb.ModelStreamInferResponse()
            message.infer_response.model_name, message.infer_response.id = request.model_name, request.id
            message.infer_response.parameters[FINAL].bool_param = True
            yield message

    async def _results(
        self, model: Model, request: pb.ModelInferRequest, deadline: float | None, *, single: bool
    ) -> AsyncGenerator[InferResult]:
        """What the model says to one request; counts how it ended.

        Args:
            single: serve only requests with exactly one response.

        Raises:
            ServiceError: also for faults of the model, which the client learns by an id only.
        """
        spec = model.spec
        if single and spec.decoupled and spec.stream_input is None:
            raise ServiceError(Code.UNIMPLEMENTED, NO_STREAMING)
        parsed = parse(request, spec, single=single, deadline=deadline)
        if single and spec.stream_input is not None and np.any(parsed.inputs.get(spec.stream_input, False)):
            raise ServiceError(Code.UNIMPLEMENTED, NO_STREAMING)
        statistics, began, queued, done = self._statistics[spec.name], time.monotonic(), 0.0, False
        try:
            async with aclosing(model.infer(parsed)) as results:
                async for result in results:
                    queued = max(queued, result.queued_seconds)
                    done = result.final or not spec.decoupled
                    yield result if result.final == done else InferResult(outputs=result.outputs, final=done)
                    if done:
                        break
            done = True
        except ServiceError:
            raise
        except Exception as error:
            reference = secrets.token_hex(8)
            log.exception("a model failed", extra={"error_id": reference, "model": spec.name})
            raise ServiceError(Code.INTERNAL, f"internal error {reference}") from error
        finally:
            passed = time.monotonic() - began
            if done:
                statistics.succeeded(passed, queued)
            else:
                statistics.failed(passed)

    def _models(self) -> dict[str, Model]:
        """All that are there now, by name."""
        more = () if self._repository is None else self._repository.models()
        return {model.spec.name: model for model in more} | self._fixed

    def _named(self, name: str) -> Model | None:
        if name in self._fixed or self._repository is None:
            return self._fixed.get(name)
        return self._repository.find(name)

    def _find(self, name: str, version: str) -> Model:
        """Raises ServiceError: NOT_FOUND, or INVALID_ARGUMENT for a version that is no number."""
        _check_version(version)
        model = self._named(name)
        if model is None:
            raise ServiceError(Code.NOT_FOUND, f"Request for unknown model: '{name}' is not found")
        if version not in ("", model.spec.version):
            raise ServiceError(Code.NOT_FOUND, f"Request for unknown model: '{name}' version {version} is not found")
        return model


def _check_version(version: str) -> None:
    if version and not (version.isascii() and version.isdigit()):
        raise refused(
            f"failed to get model version from specified version string '{version}' (details: stol), version should be "
            "an integral value > 0"
        )


def _check_region(kind: str, name: str) -> None:
    if name:
        raise ServiceError(Code.NOT_FOUND, f"Unable to find {kind} shared memory region: '{name}'")


def _echo_request_id(context: Context) -> None:
    """What is no id is left out: Triton knows none, and refuses nothing for it."""
    if is_request_id(request_id := metadata_value(context, "x-request-id") or ""):
        context.set_trailing_metadata((("x-request-id", request_id),))
