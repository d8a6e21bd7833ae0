"""LoRA adapters over the wire: chosen by name in every API, listed, loaded and unloaded while the port is open."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from nemoserve.v1 import generation_pb2 as pb
from tritonclient.grpc import service_pb2 as kserve
from tritonclient.grpc import service_pb2_grpc

from engine import AdapterLimitError, CheckpointError
from service.lora import LoraFolder
from service.served import ServedModel
from tests.service.fake_engine import FakeEngine, toy_text
from tests.service.fakes import Gate
from tests.service.grpc.kserve.calls import add, ask, outputs, stream, text
from tests.service.grpc.ports import Port, refusal, serving
from tests.service.test_lora import write


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(b"abc")


@pytest.fixture
async def port(tmp_path: Path, engine: FakeEngine) -> AsyncIterator[Port]:
    """The model `toy`, alias `short`, with the adapters `law` and `poems`. `broken` cannot be loaded, nor `ensemble`,
    which is a name of the model."""
    for name in ("law", "poems", "broken", "ensemble"):
        write(tmp_path, name)
    engine.lora_errors["broken"] = CheckpointError(f"{tmp_path}/broken: rank 64")
    loras = LoraFolder(tmp_path, ("toy", "short", "ensemble"))
    model = ServedModel("toy", ("short",), loras)
    await loras.open(engine, model.loading)
    model.ready(engine, toy_text())
    async with serving(model) as running:
        yield running


def triton(port: Port) -> Any:
    return service_pb2_grpc.GRPCInferenceServiceStub(port.channel)


async def generate(port: Port, **fields: Any) -> str:
    """The model that the answer says to be of."""
    request = pb.GenerateRequest(prompt="Hi", sampling=pb.SamplingParameters(max_tokens=2), **fields)
    first, *_ = [response async for response in port.typed.Generate(request, timeout=10)]
    return str(first.started.model)


async def test_while_loading_nobody_knows_yet_which_adapters_there_will_be(tmp_path: Path) -> None:
    async with serving(ServedModel("toy", loras=LoraFolder(tmp_path, ("toy",)))) as port:
        call = port.typed.Generate(pb.GenerateRequest(prompt="Hi", model="law"))
        assert (await refusal(call)).code() is grpc.StatusCode.UNAVAILABLE


def infer(model: str, **sampling: object) -> Any:
    request = ask(model, text_input="hi", stream=False)
    return add(request, "sampling_parameters", json.dumps({"max_tokens": 2, **sampling}))


# -- the typed API -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "adapter", "named"),
    [
        ({}, None, "toy"),
        ({"model": "short"}, None, "toy"),
        ({"adapter": "law"}, "law", "law"),
        ({"model": "toy", "adapter": "poems"}, "poems", "poems"),
        ({"model": "poems"}, "poems", "poems"),
        ({"model": "law", "adapter": "law"}, "law", "law"),
    ],
)
async def test_an_adapter_is_chosen_by_either_field(
    port: Port, engine: FakeEngine, fields: dict[str, str], adapter: str | None, named: str
) -> None:
    assert await generate(port, **fields) == named
    assert [request.adapter for request in engine.requests] == [adapter]


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"adapter": "x"}, grpc.StatusCode.NOT_FOUND, "adapter: 'x' is not loaded; loaded are law, poems"),
        ({"adapter": "broken"}, grpc.StatusCode.NOT_FOUND, "adapter: 'broken' is not loaded; loaded are law, poems"),
        ({"model": "x"}, grpc.StatusCode.NOT_FOUND, "model: 'x' is not served here; served are toy, short, law, poems"),
        (
            {"model": "law", "adapter": "poems"},
            grpc.StatusCode.INVALID_ARGUMENT,
            "adapter: 'poems' does not go with model 'law', which is another adapter",
        ),
    ],
)
async def test_an_unknown_adapter_is_refused_by_name(
    port: Port, engine: FakeEngine, fields: dict[str, str], code: grpc.StatusCode, message: str
) -> None:
    request = pb.GenerateRequest(prompt="Hi", **fields)
    error = await refusal(port.typed.Generate(request, timeout=10))
    assert (error.code(), error.details()) == (code, message)
    assert engine.requests == []


async def test_all_completions_of_a_request_run_with_its_adapter(port: Port, engine: FakeEngine) -> None:
    sampling = pb.SamplingParameters(max_tokens=2, n=3)
    request = pb.GenerateRequest(prompt="Hi", model="law", sampling=sampling)
    assert [response async for response in port.typed.Generate(request, timeout=10)]
    assert [each.adapter for each in engine.requests] == ["law"] * 3


async def test_adapters_are_listed_as_models_of_their_base(port: Port) -> None:
    models = (await port.typed.ListModels(pb.ListModelsRequest(), timeout=10)).models
    assert [(each.name, each.base_model, each.lora_rank) for each in models] == [
        ("toy", "", 0),
        ("law", "toy", 4),
        ("poems", "toy", 4),
    ]
    assert len({(each.architecture, each.parameters, each.max_model_len, each.chat) for each in models}) == 1
    model = (await port.typed.GetModel(pb.GetModelRequest(model="law"), timeout=10)).model
    assert model == models[1]
    assert list(models[0].aliases) == ["short"]
    assert list(model.aliases) == []
    tokens = await port.typed.Tokenize(pb.TokenizeRequest(model="law", text="Hi"), timeout=10)
    assert list(tokens.token_ids) == [72, 105]


# -- KServe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "adapter"),
    [
        (infer("toy"), None),
        (infer("vllm_model"), None),
        (infer("law"), "law"),
        (infer("toy", lora_name="law"), "law"),
        (infer("vllm_model", lora_name="poems"), "poems"),
        (infer("poems", lora_name="poems"), "poems"),
        (ask("toy", parameters={"lora_name": "law", "max_tokens": 2}, text_input="hi", stream=False), "law"),
    ],
)
async def test_the_models_name_or_lora_name_chooses(
    port: Port, engine: FakeEngine, request_: Any, adapter: str | None
) -> None:
    response = await triton(port).ModelInfer(request_, timeout=10)
    assert (response.model_name, outputs(response)) == (request_.model_name, {"text_output": ["hiab"]})
    assert [request.adapter for request in engine.requests] == [adapter]


async def test_one_stream_mixes_adapters(port: Port, engine: FakeEngine) -> None:
    names = ["toy", "law", "poems", "law"]
    requests = []
    for number, name in enumerate(names):
        request = ask(name, id=str(number), text_input="hi", stream=True)
        requests.append(add(request, "sampling_parameters", json.dumps({"max_tokens": 3})))
    messages = await stream(triton(port), *requests, timeout=10)
    assert {message.error_message for message in messages} == {""}
    for number, name in enumerate(names):
        own = [m.infer_response for m in messages if m.infer_response.id == str(number)]
        assert ("".join(map(text, own)), {each.model_name for each in own}) == ("abc", {name})
    assert sorted(request.adapter or "" for request in engine.requests) == ["", "law", "law", "poems"]


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (infer("x"), grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'x' is not found"),
        (infer("broken"), grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'broken' is not found"),
        (infer("toy", lora_name="x"), grpc.StatusCode.NOT_FOUND, "adapter: 'x' is not loaded; loaded are law, poems"),
        (infer("toy", lora_name=7), grpc.StatusCode.INVALID_ARGUMENT, "lora_name: 7 must be a string"),
        (
            infer("law", lora_name="poems"),
            grpc.StatusCode.INVALID_ARGUMENT,
            "lora_name: 'poems' does not go with 'law', which is another adapter",
        ),
    ],
)
async def test_a_wrong_choice_is_refused(port: Port, request_: Any, code: grpc.StatusCode, message: str) -> None:
    error = await refusal(triton(port).ModelInfer(request_, timeout=10))
    assert (error.code(), error.details()) == (code, message)


async def index(port: Port, *, ready: bool = False) -> dict[str, tuple[str, str]]:
    found = await triton(port).RepositoryIndex(kserve.RepositoryIndexRequest(ready=ready), timeout=10)
    assert [each.name for each in found.models] == sorted({each.name for each in found.models})  # each stands once
    return {each.name: (each.state, each.reason) for each in found.models if each.name in LORAS}


LORAS = ("law", "poems", "broken", "late")


async def test_the_repository_shows_what_is_loaded_and_what_is_not_and_why(port: Port) -> None:
    assert await index(port) == {
        "law": ("READY", ""),
        "poems": ("READY", ""),
        "broken": ("UNAVAILABLE", "broken: rank 64"),
    }
    assert set(await index(port, ready=True)) == {"law", "poems"}
    for name, ready in (("law", True), ("broken", False), ("x", False)):
        assert (await triton(port).ModelReady(kserve.ModelReadyRequest(name=name), timeout=10)).ready is ready
    metadata = await triton(port).ModelMetadata(kserve.ModelMetadataRequest(name="law"), timeout=10)
    assert (metadata.name, metadata.inputs[0].name) == ("law", "text_input")
    config = await triton(port).ModelConfig(kserve.ModelConfigRequest(name="law"), timeout=10)
    assert (config.config.name, config.config.model_transaction_policy.decoupled) == ("law", True)
    await triton(port).ModelInfer(infer("law"), timeout=10)
    statistics = await triton(port).ModelStatistics(kserve.ModelStatisticsRequest(), timeout=10)
    counts = {each.name: each.inference_count for each in statistics.model_stats}
    assert (counts["law"], counts["poems"], counts["toy"]) == (1, 0, 0)
    whole = await triton(port).RepositoryIndex(kserve.RepositoryIndexRequest(), timeout=10)
    assert [(each.state, each.reason) for each in whole.models if each.name == "ensemble"] == [("READY", "")]
    assert (await triton(port).ServerReady(kserve.ServerReadyRequest(), timeout=10)).ready


async def test_an_adapter_is_loaded_and_unloaded_at_run_time(port: Port, tmp_path: Path) -> None:
    load, unload = kserve.RepositoryModelLoadRequest, kserve.RepositoryModelUnloadRequest
    error = await refusal(triton(port).ModelInfer(infer("late"), timeout=10))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    write(tmp_path, "late")
    await triton(port).RepositoryModelLoad(load(model_name="late"), timeout=10)
    assert (await index(port))["late"] == ("READY", "")
    assert outputs(await triton(port).ModelInfer(infer("late"), timeout=10)) == {"text_output": ["hiab"]}
    await triton(port).RepositoryModelUnload(unload(model_name="late"), timeout=10)
    assert (await index(port))["late"] == ("UNAVAILABLE", "unloaded")
    error = await refusal(triton(port).ModelInfer(infer("late"), timeout=10))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    await triton(port).RepositoryModelLoad(load(model_name="late"), timeout=10)
    assert await generate(port, model="late") == "late"


async def test_a_stream_that_has_begun_ends_although_its_adapter_is_unloaded(port: Port, engine: FakeEngine) -> None:
    engine.gate = Gate()
    request = add(ask("law", text_input="hi", stream=True), "sampling_parameters", json.dumps({"max_tokens": 3}))
    running = asyncio.create_task(stream(triton(port), request, timeout=10))
    await engine.until(lambda: len(engine.requests) == 1)
    await triton(port).RepositoryModelUnload(kserve.RepositoryModelUnloadRequest(model_name="law"), timeout=10)
    engine.gate.allow(3)
    messages = await running
    assert "".join(text(message.infer_response) for message in messages) == "abc"
    assert {message.infer_response.model_name for message in messages} == {"law"}


@pytest.mark.parametrize(
    ("method", "name", "code", "message"),
    [
        ("Load", "nowhere", "NOT_FOUND", "no LoRA adapter 'nowhere' in the server's folder of adapters"),
        ("Load", "broken", "FAILED_PRECONDITION", "broken: rank 64"),
        ("Load", "full", "RESOURCE_EXHAUSTED", "max_cpu_loras: 2"),
        ("Load", "../law", "INVALID_ARGUMENT", "model_name: '../law' must be the name of a folder of adapters"),
        ("Load", "/etc", "INVALID_ARGUMENT", "model_name: '/etc' must be"),
        ("Load", "", "INVALID_ARGUMENT", "model_name: '' must be"),
        (
            "Load",
            "toy",
            "INVALID_ARGUMENT",
            "model 'toy' is there as long as the server; only LoRA adapters come and go",
        ),
        ("Unload", "ensemble", "INVALID_ARGUMENT", "model 'ensemble' is there as long as the server"),
        ("Unload", "nowhere", "NOT_FOUND", "adapter: 'nowhere' is not loaded; loaded are law, poems"),
        ("Unload", "../law", "NOT_FOUND", "adapter: '../law' is not loaded"),
    ],
)
async def test_a_load_or_unload_that_cannot_be_says_why(
    port: Port, engine: FakeEngine, tmp_path: Path, method: str, name: str, code: str, message: str
) -> None:
    write(tmp_path, "full")
    engine.lora_errors["full"] = AdapterLimitError("max_cpu_loras: 2")
    request = getattr(kserve, f"RepositoryModel{method}Request")(model_name=name)
    error = await refusal(getattr(triton(port), f"RepositoryModel{method}")(request, timeout=10))
    assert error.code().name == code
    assert (error.details() or "").startswith(message)
    assert sorted(engine.lora_paths) == ["law", "poems"]


async def test_load_parameters_and_other_repositories_are_refused(port: Port) -> None:
    request = kserve.RepositoryModelLoadRequest(model_name="law")
    request.parameters["config"].string_param = "{}"
    error = await refusal(triton(port).RepositoryModelLoad(request, timeout=10))
    assert (error.code(), error.details()) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "load parameter 'config' is not supported: models are loaded as is",
    )
    request = kserve.RepositoryModelLoadRequest(model_name="law", repository_name="r")
    assert (await refusal(triton(port).RepositoryModelLoad(request))).code() is grpc.StatusCode.UNIMPLEMENTED
