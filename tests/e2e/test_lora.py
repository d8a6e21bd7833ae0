"""LoRA adapters of the embedded model: a real server process, the real tritonclient, random weights of rank 4 and 8."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
import tritonclient.grpc as triton
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc
from torch import Tensor
from tritonclient.utils import InferenceServerException

from engine.checkpoint import open_checkpoint
from engine.config import ModelConfig
from tests.e2e.conftest import ServerProcess
from tests.e2e.test_prompt_logprobs import logprobs
from tests.e2e.test_tritonclient import Stream, text_of, vllm_inputs
from tests.tiny_adapters import write_peft

MODEL = "smollm2-135m-instruct"
PROMPTS = ["The capital of France is", "Once upon a time", "def main():"]


@dataclass(frozen=True)
class Adapters:
    """Folder of the server's adapters, and what each of them adds to the weights of the model."""

    folder: Path
    model: ModelConfig
    added: dict[str | None, dict[str, Tensor]]


@pytest.fixture(scope="module")
def adapters(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    folder = tmp_path_factory.mktemp("adapters")
    with open_checkpoint(str(smollm2_path)) as checkpoint:
        model = checkpoint.config
    added: dict[str | None, dict[str, Tensor]] = {
        None: {},
        "small": write_peft(folder / "small", model, rank=4, alpha=4, seed=1, modules=("q_proj", "v_proj")),
        "large": write_peft(folder / "large", model, rank=8, alpha=4, seed=2, dtype=torch.bfloat16),
    }
    return Adapters(folder, model, added)


@pytest.fixture(scope="module")
def server(smollm2_path: Path, adapters: Adapters) -> Iterator[ServerProcess]:
    """One slot: the two adapters take turns in it."""
    options = ("--served-model-name", MODEL, "--dtype", "fp32", "--max-loras", "1", "--max-lora-rank", "8")
    running = ServerProcess.start(smollm2_path, "--lora-dir", adapters.folder, *options)
    yield running
    assert running.stop() == 0, "".join(running.lines)


@pytest.fixture
def client(server: ServerProcess) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.address) as connected:
        yield connected


@contextmanager
def merged(model: transformers.PreTrainedModel, added: dict[str, Tensor]) -> Iterator[transformers.PreTrainedModel]:
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in added}
    with torch.no_grad():
        for name, delta in added.items():
            parameters[name].copy_(parameters[name].double() + delta)
        try:
            yield model
        finally:
            for name, weight in before.items():
                parameters[name].copy_(weight)


def test_logprobs_of_a_mixed_batch_are_those_of_transformers_with_merged_weights(
    server: ServerProcess, adapters: Adapters, smollm2_reference: transformers.PreTrainedModel
) -> None:
    with server.channel() as channel:
        typed = rpc.GenerationServiceStub(channel)
        tokens = list(typed.Tokenize(pb.TokenizeRequest(text=Path(__file__).read_text()), timeout=10).token_ids)
        prompts = {name: tokens[start : start + 60] for start, name in enumerate(adapters.added)}
        sampling = pb.SamplingParameters(max_tokens=1, prompt_logprobs=0)
        calls = {
            name: typed.Generate(
                pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling, adapter=name or ""),
                timeout=120,
            )
            for name, prompt in prompts.items()
        }
        answers = {name: list(call) for name, call in calls.items()}
    for name, prompt in prompts.items():
        plain = logprobs(smollm2_reference, prompt)
        with merged(smollm2_reference, adapters.added[name]) as model:
            every = logprobs(model, prompt)
        expected = every.gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0]
        got = [entry.logprob for event in answers[name] for entry in event.prompt_logprobs.logprobs]
        assert torch.tensor(got).sub(expected).abs().max() < 2e-3
        if name is not None:
            assert (plain - every).abs().max() > 1.0  # it does change what the model says


def test_adapters_are_models_by_their_names(client: triton.InferenceServerClient, server: ServerProcess) -> None:
    index = {each.name: each.state for each in client.get_model_repository_index().models}
    assert {"small": "READY", "large": "READY", MODEL: "READY"}.items() <= index.items()
    assert client.is_model_ready("small")
    assert client.get_model_metadata("large").inputs[0].name == "text_input"
    with server.channel() as channel:
        models = rpc.GenerationServiceStub(channel).ListModels(pb.ListModelsRequest(), timeout=10).models
    assert [(each.name, each.base_model, each.lora_rank) for each in models] == [
        (MODEL, "", 0),
        ("large", MODEL, 8),
        ("small", MODEL, 4),
    ]


def test_requests_of_all_models_on_one_stream_say_what_they_say_alone(client: triton.InferenceServerClient) -> None:
    asked = {f"{model} {n}": (model, p) for n, p in enumerate(PROMPTS) for model in (MODEL, "small", "large")}
    alone = {
        name: text_of(client.infer(model, vllm_inputs(prompt, stream=False))) for name, (model, prompt) in asked.items()
    }
    assert len(set(alone.values())) == len(alone)
    by_parameter = client.infer(MODEL, vllm_inputs(PROMPTS[0], stream=False, lora_name="small"))
    assert text_of(by_parameter) == alone["small 0"]
    with Stream(client) as stream:
        for name, (model, prompt) in asked.items():
            client.async_stream_infer(model, vllm_inputs(prompt), request_id=name)
        together = stream.texts(*asked)
    assert {name: "".join(deltas) for name, deltas in together.items()} == alone


def status_of(call: object, *arguments: object) -> str:
    with pytest.raises(InferenceServerException) as caught:
        call(*arguments)  # type: ignore[operator]
    return str(caught.value.status()).removeprefix("StatusCode.")


def test_adapters_come_and_go_under_traffic(
    client: triton.InferenceServerClient, server: ServerProcess, adapters: Adapters
) -> None:
    write_peft(adapters.folder / "wide", adapters.model, rank=9, modules=("q_proj",), layers=(0,))
    write_peft(adapters.folder / "late", adapters.model, rank=8, alpha=1, seed=3, modules=("down_proj",))
    assert status_of(client.infer, "late", vllm_inputs(stream=False)) == "NOT_FOUND"
    plain = text_of(client.infer(MODEL, vllm_inputs(stream=False)))
    with Stream(client) as stream:
        long = vllm_inputs(max_tokens=150, ignore_eos=True)
        for model in (MODEL, "small"):
            client.async_stream_infer(model, long, request_id=model)
        client.async_stream_infer("large", vllm_inputs(), request_id="large")  # waits for the slot of `small`
        client.load_model("late")
        assert status_of(client.load_model, "wide") == "FAILED_PRECONDITION"
        assert status_of(client.load_model, "nowhere") == "NOT_FOUND"
        assert status_of(client.load_model, "../adapters/late") == "INVALID_ARGUMENT"
        assert status_of(client.load_model, MODEL) == "INVALID_ARGUMENT"
        client.unload_model("small")  # runs
        client.unload_model("large")  # waits
        assert status_of(client.infer, "small", vllm_inputs(stream=False)) == "NOT_FOUND"
        client.async_stream_infer("late", vllm_inputs(), request_id="late")
        texts = {name: "".join(deltas) for name, deltas in stream.texts(MODEL, "small", "large", "late").items()}
    assert texts[MODEL].startswith(plain)
    assert len(set(texts.values())) == 4
    index = {each.name: (each.state, each.reason) for each in client.get_model_repository_index().models}
    assert index["small"] == index["large"] == ("UNAVAILABLE", "unloaded")
    assert index["late"] == ("READY", "")
    assert "wide/adapter_model.safetensors: tensor" in index["wide"][1]
    for name in ("small", "large"):
        client.load_model(name)
    client.unload_model("late")
    again = text_of(client.infer("large", vllm_inputs(stream=False)))
    assert again == texts["large"]
    for name in ("wide", "late"):
        shutil.rmtree(adapters.folder / name)


def test_the_folder_is_watched_under_nims_names(
    smollm2_path: Path, adapters: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(adapters.folder / "small", tmp_path / "first")
    names = {"SOURCE": str(tmp_path), "REFRESH_INTERVAL": "0.1"}
    for name, value in names.items():
        monkeypatch.setenv(f"NIM_PEFT_{name}", value)
    monkeypatch.setenv("NIM_MAX_GPU_LORAS", "2")
    server = ServerProcess.start(smollm2_path)
    try:
        with triton.InferenceServerClient(server.address) as client:
            assert client.is_model_ready("first")
            shutil.copytree(adapters.folder / "large", tmp_path / "second")
            until(lambda: client.is_model_ready("second"))
            shutil.rmtree(tmp_path / "first")
            until(lambda: not client.is_model_ready("first"))
            assert client.is_model_ready("second")
    finally:
        server.kill()
    assert not any("unknown variable" in line for line in server.lines)


def until(condition: object, seconds: float = 30.0) -> None:
    assert callable(condition)
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)
