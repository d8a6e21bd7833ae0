"""Twin of tests.service.grpc.kserve.toys.Sums."""

import triton_python_backend_utils as triton


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            a, b = (triton.get_input_tensor_by_name(request, name).as_numpy() for name in "ab")
            responses.append(
                triton.InferenceResponse([triton.Tensor("sum", a + b), triton.Tensor("difference", a - b)])
            )
        return responses
