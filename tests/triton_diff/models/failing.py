"""Twin of tests.service.grpc.kserve.toys.Failing."""

import triton_python_backend_utils as triton

CODES = ("INTERNAL", "NOT_FOUND", "INVALID_ARG", "UNAVAILABLE", "UNSUPPORTED")


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            number = int(triton.get_input_tensor_by_name(request, "code").as_numpy()[0])
            if number == len(CODES):
                raise ValueError("a bug with a secret in its text")
            code = getattr(triton.TritonError, CODES[number])  # not there yet when the module is loaded
            error = triton.TritonError(f"refused for reason {number}", code)
            responses.append(triton.InferenceResponse(error=error))
        return responses
