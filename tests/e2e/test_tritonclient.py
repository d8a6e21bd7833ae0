"""The real tritonclient drives a real server process with the embedded model."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from tests.e2e.conftest import ServerProcess

PROMPT = "The capital of France is"
Result = tuple[triton.InferResult | None, InferenceServerException | None]


@pytest.fixture
def client(server: ServerProcess) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.address) as connected:
        yield connected


def tensor(name: str, dtype: str, value: object, shape: tuple[int, ...] = (1,)) -> triton.InferInput:
    kinds = {"BYTES": object, "BOOL": bool, "INT32": np.int32, "FP32": np.float32}
    made = triton.InferInput(name, list(shape), dtype)
    value = value.encode() if isinstance(value, str) else value
    made.set_data_from_numpy(np.array([value], dtype=kinds[dtype]).reshape(shape))
    return made


def vllm_inputs(prompt: str = PROMPT, *, stream: bool = True, **sampling: object) -> list[triton.InferInput]:
    parameters = json.dumps({"max_tokens": 12, "temperature": 0, **sampling})
    return [
        tensor("text_input", "BYTES", prompt),
        tensor("stream", "BOOL", stream),
        tensor("sampling_parameters", "BYTES", parameters),
        tensor("exclude_input_in_output", "BOOL", True),
    ]


def text_of(result: triton.InferResult) -> str:
    output = result.as_numpy("text_output")
    return "" if output is None else output[0].decode()


def is_final(result: triton.InferResult) -> bool:
    return bool(result.get_response().parameters["triton_final_response"].bool_param)


class Stream:
    """An open stream that collects what arrives, in order."""

    def __init__(self, client: triton.InferenceServerClient) -> None:
        self.client = client
        self.arrived: queue.SimpleQueue[Result] = queue.SimpleQueue()

    def __enter__(self) -> Stream:
        self.client.start_stream(lambda result, error: self.arrived.put((result, error)))
        return self

    def __exit__(self, *_: object) -> None:
        self.client.stop_stream()

    def texts(self, *ids: str) -> dict[str, list[str]]:
        """Deltas by request id, once each of `ids` has had its final response."""
        deltas: dict[str, list[str]] = {name: [] for name in ids}
        open_ = set(ids)
        while open_:
            result, error = self.arrived.get(timeout=60)
            assert error is None
            assert result is not None
            name = result.get_response().id
            deltas[name].append(text_of(result))
            if is_final(result):
                open_.remove(name)
        return deltas


def test_management(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    for name in ("smollm2-135m-instruct", "vllm_model", "ensemble", "tensorrt_llm_bls"):
        assert client.is_model_ready(name)
        config = client.get_model_config(name).config
        assert config.model_transaction_policy.decoupled
        inputs = {tensor.name for tensor in client.get_model_metadata(name).inputs}
        assert "text_input" in inputs
    assert not client.is_model_ready("nope")
    assert client.get_server_metadata().name == "nemoserve"


def test_streamed_deltas_add_up_to_the_unary_answer(client: triton.InferenceServerClient) -> None:
    whole = text_of(client.infer("vllm_model", vllm_inputs(stream=False)))
    assert "Paris" in whole
    with Stream(client) as stream:
        client.async_stream_infer("vllm_model", vllm_inputs(), request_id="a")
        deltas = stream.texts("a")["a"]
    assert len(deltas) > 1
    assert "".join(deltas) == whole


def test_both_tensor_conventions_give_the_same_text(client: triton.InferenceServerClient) -> None:
    trtllm = [
        tensor("text_input", "BYTES", PROMPT, (1, 1)),
        tensor("max_tokens", "INT32", 12, (1, 1)),
        tensor("temperature", "FP32", 0.0, (1, 1)),
        tensor("exclude_input_in_output", "BOOL", True, (1, 1)),
    ]
    assert text_of(client.infer("ensemble", trtllm)) == text_of(client.infer("vllm_model", vllm_inputs(stream=False)))


def test_guided_decoding_of_both_conventions_gives_the_same_json(client: triton.InferenceServerClient) -> None:
    schema = json.dumps({"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]})
    trtllm = [
        tensor("text_input", "BYTES", PROMPT, (1, 1)),
        tensor("max_tokens", "INT32", 40, (1, 1)),
        tensor("guided_decoding_guide_type", "BYTES", "json_schema", (1, 1)),
        tensor("guided_decoding_guide", "BYTES", schema, (1, 1)),
    ]
    one = text_of(client.infer("ensemble", trtllm))
    other = text_of(client.infer("vllm_model", vllm_inputs(stream=False, max_tokens=40, guided_json=schema)))
    assert one == other
    assert one.startswith("{")


def test_requests_on_one_stream_are_told_apart_by_id(client: triton.InferenceServerClient) -> None:
    prompts = {str(i): f"The number {i} is" for i in range(6)}
    alone = {
        name: text_of(client.infer("vllm_model", vllm_inputs(prompt, stream=False))) for name, prompt in prompts.items()
    }
    with Stream(client) as stream:
        for name, prompt in prompts.items():
            client.async_stream_infer("vllm_model", vllm_inputs(prompt), request_id=name)
        together = stream.texts(*prompts)
    assert {name: "".join(deltas) for name, deltas in together.items()} == alone


def test_an_error_of_one_request_leaves_the_stream_and_the_others_alone(client: triton.InferenceServerClient) -> None:
    with Stream(client) as stream:
        client.async_stream_infer("vllm_model", vllm_inputs(max_tokens=30, ignore_eos=True), request_id="good")
        client.async_stream_infer("vllm_model", vllm_inputs(temperature=-1), request_id="bad")
        client.async_stream_infer("nope", vllm_inputs(), request_id="unknown")
        errors, finals = [], 0
        while len(errors) < 2 or finals < 1:
            result, error = stream.arrived.get(timeout=60)
            if error is not None:
                errors.append(str(error))
            elif result is not None:
                finals += is_final(result)
    assert any("temperature" in error for error in errors)
    assert any("nope" in error for error in errors)


def test_cancelling_the_stream_frees_the_engine(client: triton.InferenceServerClient, server: ServerProcess) -> None:
    arrived: queue.SimpleQueue[Result] = queue.SimpleQueue()
    client.start_stream(lambda result, error: arrived.put((result, error)))
    client.async_stream_infer("vllm_model", vllm_inputs(max_tokens=4000, ignore_eos=True))
    result, error = arrived.get(timeout=30)
    assert (result is not None, error) == (True, None)
    client.stop_stream(cancel_requests=True)
    assert server.until("an empty engine", lambda load: load.running_requests == 0).kv_pages_used == 0


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        (vllm_inputs(""), "text_input"),
        (vllm_inputs(max_tokens=0), "max_tokens"),
        (vllm_inputs(banana=1), "banana"),
        (vllm_inputs("word " * 9000), "8192"),
        ([tensor("text_input", "BYTES", b"\xff\xfe")], "UTF-8"),
        ([tensor("text_input", "INT32", 3)], "INT32"),
        ([tensor("stream", "BOOL", False)], "text_input"),
    ],
    ids=["empty prompt", "max_tokens", "unknown parameter", "too long", "not UTF-8", "dtype", "missing"],
)
def test_bad_tensors_are_refused_by_name(
    client: triton.InferenceServerClient, inputs: list[triton.InferInput], names: str
) -> None:
    for each in inputs:
        if each.name() == "stream":
            each.set_data_from_numpy(np.array([False]))
    with pytest.raises(InferenceServerException) as caught:
        client.infer("vllm_model", inputs)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert names in caught.value.message()
