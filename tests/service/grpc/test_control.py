"""The served model itself loaded and unloaded through Triton's repository API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import pytest_asyncio
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as rpc

from service.errors import Code, ServiceError
from tests.service.fake_engine import FakeEngine
from tests.service.grpc.ports import Port, served, serving


@dataclass
class Control:
    """Writes down what it is asked for; refuses what it is told to."""

    asked: list[object] = field(default_factory=list)
    refusal: ServiceError | None = None

    async def load(self, model: str | None) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.asked.append(("load", model))

    async def unload(self) -> None:
        self.asked.append("unload")


@pytest.fixture
def control() -> Control:
    return Control()


@pytest_asyncio.fixture
async def port(control: Control) -> AsyncIterator[Port]:
    model = served(FakeEngine())
    model.control = control
    async with serving(model) as port:
        yield port


def load(name: str, **parameters: Any) -> pb.RepositoryModelLoadRequest:
    request = pb.RepositoryModelLoadRequest(model_name=name)
    for key, value in parameters.items():
        kind = "string_param" if isinstance(value, str) else "int64_param"
        setattr(request.parameters[key], kind, value)
    return request


def named(model: object) -> str:
    return f'{{"parameters": {{"model": {{"string_value": {model}}}}}}}'


async def refused(call: Any) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code().name, caught.value.details() or ""


@pytest.mark.parametrize(
    ("parameters", "asked"),
    [
        ({}, None),
        ({"model": "other"}, "other"),
        ({"config": named('"other"')}, "other"),
        ({"config": named('"other"'), "model": "other"}, "other"),
    ],
)
@pytest.mark.parametrize("name", ["toy", "ensemble"])
async def test_every_name_of_the_model_loads_it(
    port: Port, control: Control, name: str, parameters: dict[str, str], asked: str | None
) -> None:
    triton = rpc.GRPCInferenceServiceStub(port.channel)
    await triton.RepositoryModelLoad(load(name, **parameters), timeout=10)
    await triton.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name=name), timeout=10)
    assert control.asked == [("load", asked), "unload"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"weird": "1"}, "unrecognized load parameter 'weird'"),
        ({"model": 5}, "invalid value type for 'model' parameter"),
        ({"config": "{"}, "load parameter 'config' must be"),
        ({"config": "{}"}, "load parameter 'config' must be"),
        ({"config": named(5)}, "load parameter 'config' must be"),
        ({"config": "[" * 100_000}, "load parameter 'config' must be"),
        ({"config": named('"a"'), "model": "b"}, "name different models"),
    ],
)
async def test_what_a_load_cannot_mean_is_refused_by_name(
    port: Port, control: Control, parameters: dict[str, Any], message: str
) -> None:
    triton = rpc.GRPCInferenceServiceStub(port.channel)
    code, details = await refused(triton.RepositoryModelLoad(load("toy", **parameters), timeout=10))
    assert code == "INVALID_ARGUMENT"
    assert message in details
    assert control.asked == []


async def test_a_refusal_of_the_supervisor_is_the_answer(port: Port, control: Control) -> None:
    control.refusal = ServiceError(Code.PERMISSION_DENIED, "takes an administrator's key")
    triton = rpc.GRPCInferenceServiceStub(port.channel)
    answer = await refused(triton.RepositoryModelLoad(load("toy"), timeout=10))
    assert answer == ("PERMISSION_DENIED", "takes an administrator's key")


async def test_without_control_triton_refuses_in_its_own_words() -> None:
    async with serving(served(FakeEngine())) as port:
        triton = rpc.GRPCInferenceServiceStub(port.channel)
        code, details = await refused(triton.RepositoryModelLoad(load("toy"), timeout=10))
    assert (code, "not allowed" in details) == ("UNAVAILABLE", True)
