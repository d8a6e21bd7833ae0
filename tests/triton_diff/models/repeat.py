"""Twin of tests.service.grpc.kserve.toys.Repeat."""

import numpy as np
import triton_python_backend_utils as triton

FINAL = triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL


def scalar(request, name, default):
    tensor = triton.get_input_tensor_by_name(request, name)
    return default if tensor is None else tensor.as_numpy()[0]


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            self.repeat(request, request.get_response_sender())

    def repeat(self, request, sender):
        count, tell, fail_at = (int(scalar(request, *each)) for each in (("count", 0), ("tell", 0), ("fail_at", -1)))
        for number in range(count):
            if number == fail_at:
                error = triton.TritonError(f"broke at {number}", triton.TritonError.INTERNAL)
                sender.send(triton.InferenceResponse(error=error), flags=FINAL)
                return
            final = bool(tell) and number == count - 1
            response = triton.InferenceResponse([triton.Tensor("number", np.array([number], np.int32))])
            sender.send(response, flags=FINAL if final else 0)
            if final:
                return
        sender.send(flags=FINAL)
