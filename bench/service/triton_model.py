"""Triton's side of `bench.service`: a decoupled model of its Python backend that answers at once, token by token.

It does what Triton's vLLM backend does once vLLM has a token (src/model.py): one thread makes a response with the BYTES
tensor `text_output` and sends it, for every request in turn. Runs in Triton's own interpreter and imports nothing of
ours; its tokens say when they were made, as those of `bench.service.engine`.
"""

import json
import threading
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

FINAL = triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.pace = float(json.loads(args["model_config"])["parameters"]["pace"]["string_value"])
        self.left: list[tuple[Any, int]] = []  # that run: where responses go, and how many are to come
        self.arrived = threading.Condition()
        threading.Thread(target=self.step_for_ever, daemon=True).start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            parameters = triton.get_input_tensor_by_name(request, "sampling_parameters").as_numpy()[0]
            with self.arrived:
                self.left.append((request.get_response_sender(), json.loads(parameters)["max_tokens"]))
                self.arrived.notify()

    def step_for_ever(self) -> None:
        due = time.monotonic()
        while True:
            with self.arrived:
                while not self.left:
                    self.arrived.wait()
                running, self.left = self.left, []
            if self.pace:
                now = time.monotonic()
                due = max(due + self.pace, now)
                time.sleep(due - now)
            token = b"%05d" % (int(time.monotonic() * 100_000) % 100_000)
            for sender, left in running:
                response = triton.InferenceResponse([triton.Tensor("text_output", np.array([token], dtype=object))])
                sender.send(response, flags=0 if left > 1 else FINAL)
            with self.arrived:
                self.left = [(sender, left - 1) for sender, left in running if left > 1] + self.left
