"""What the servicer answers, call by call: as the tables say that Triton does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.protobuf import text_format
from grpc import StatusCode
from grpc.aio import AioRpcError
from tritonclient.grpc import service_pb2 as pb

from tests.service.grpc.kserve.calls import ask, packed
from tests.service.grpc.kserve.conftest import Running, serving
from tests.service.grpc.kserve.inference_transcript import ACCEPTED, REFUSED, SUM, echo, sums
from tests.service.grpc.kserve.management_transcript import MANAGEMENT
from tests.service.grpc.kserve.toys import comparable


@pytest.fixture
async def toys() -> AsyncIterator[Running]:
    async with serving(comparable(), server_version="1.2.3") as running:
        yield running


async def transcript(stub: Any, rpc: str, request: Any) -> tuple[StatusCode, str]:
    """The call's code, and its error or response in text."""
    try:
        response = await getattr(stub, rpc)(request, timeout=10)
    except AioRpcError as error:
        return error.code(), error.details() or ""
    return StatusCode.OK, text_format.MessageToString(response, as_one_line=True)


async def test_management_calls_answer_as_the_table_says(toys: Running) -> None:
    for case, (rpc, request, code, text) in MANAGEMENT.items():
        assert (case, await transcript(toys.stub, rpc, request)) == (case, (code, text))


async def test_bad_inference_requests_are_refused_as_the_table_says(toys: Running) -> None:
    for case, (request, code, text) in REFUSED.items():
        assert (case, await transcript(toys.stub, "ModelInfer", request)) == (case, (code, text))


async def test_good_inference_requests_are_answered_as_the_table_says(toys: Running) -> None:
    for case, (request, text) in ACCEPTED.items():
        response = await toys.stub.ModelInfer(request, timeout=10)
        response.ClearField("raw_output_contents")
        assert (case, text_format.MessageToString(response, as_one_line=True)) == (case, text)


async def test_output_data_is_raw(toys: Running) -> None:
    response = await toys.stub.ModelInfer(sums(outputs=("sum",)))
    assert response.raw_output_contents == [SUM.tobytes()]
    response = await toys.stub.ModelInfer(echo(packed("é", b"\xff"), 2))
    assert response.raw_output_contents == [packed("é", b"\xff")]


async def test_server_metadata_names_only_what_is_served(toys: Running) -> None:
    metadata = await toys.stub.ServerMetadata(pb.ServerMetadataRequest())
    assert (metadata.name, metadata.version) == ("nemoserve", "1.2.3")
    assert {"system_shared_memory", "cuda_shared_memory", "sequence"}.isdisjoint(metadata.extensions)


async def test_a_bug_of_a_model_is_told_by_an_id_only(toys: Running) -> None:
    code, text = await transcript(toys.stub, "ModelInfer", ask("failing", code=5))
    assert code is StatusCode.INTERNAL
    assert text.startswith("internal error ")
    assert "secret" not in text
