"""Twin of tests.service.grpc.kserve.toys.Optional."""

import triton_python_backend_utils as triton


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            given = [triton.get_input_tensor_by_name(request, name) for name in ("must", "may")]
            total = sum(tensor.as_numpy() for tensor in given if tensor is not None)
            responses.append(triton.InferenceResponse([triton.Tensor("sum", total)]))
        return responses
