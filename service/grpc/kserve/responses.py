"""Results of a model as messages. One message serves all responses to a request: those of a stream differ in little
more than their data, and to make each anew costs a third of what it costs to send it.
"""

from __future__ import annotations

from tritonclient.grpc import service_pb2 as pb

from service.grpc.kserve.model import InferResult, ModelSpec
from service.grpc.kserve.tensors import raw_bytes

FINAL = "triton_final_response"


class Responses:
    """The responses to one request: the outputs that it asks for, in the model's order.

    Args:
        flagged: each says whether it is the last one.
    """

    def __init__(self, spec: ModelSpec, request: pb.ModelInferRequest, *, flagged: bool = False) -> None:
        wanted = {output.name for output in request.outputs}
        self._wanted = [output for output in spec.outputs if not wanted or output.name in wanted]
        self._message = pb.ModelStreamInferResponse()
        self._response = self._message.infer_response
        self._response.model_name, self._response.model_version = spec.name, spec.version
        self._response.id = request.id
        self._final = self._response.parameters[FINAL] if flagged else None
        self._shapes: list[tuple[int, ...] | None] = [None] * len(self._wanted)  # those that the message has now

    def message(self, result: InferResult) -> pb.ModelStreamInferResponse:
        """The next one. It is there until the one after it is made."""
        response = self._response
        arrays = [result.outputs.get(output.name) for output in self._wanted]
        shapes = [None if array is None else array.shape for array in arrays]
        if shapes != self._shapes:
            self._shapes = shapes
            del response.outputs[:]
            for output, shape in zip(self._wanted, shapes, strict=True):
                if shape is not None:
                    response.outputs.add(name=output.name, datatype=output.datatype, shape=shape)
        response.raw_output_contents[:] = [
            raw_bytes(output.datatype, array)
            for output, array in zip(self._wanted, arrays, strict=True)
            if array is not None
        ]
        if self._final is not None:
            self._final.bool_param = result.final
        return self._message


def response(spec: ModelSpec, request: pb.ModelInferRequest, result: InferResult) -> pb.ModelInferResponse:
    """The only one to a request."""
    return Responses(spec, request).message(result).infer_response
