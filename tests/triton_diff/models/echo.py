"""Twin of tests.service.grpc.kserve.toys.Echo."""

import triton_python_backend_utils as triton


class TritonPythonModel:
    def execute(self, requests):
        texts = [triton.get_input_tensor_by_name(request, "text").as_numpy() for request in requests]
        return [triton.InferenceResponse([triton.Tensor("text", text)]) for text in texts]
