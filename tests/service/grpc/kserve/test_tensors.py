"""The wire codec: whatever numpy makes comes back the same, and no bytes break it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient.grpc import service_pb2 as pb

from service.errors import Code, ServiceError
from service.grpc.kserve.model import ModelSpec, TensorSpec
from service.grpc.kserve.requests import parse
from service.grpc.kserve.tensors import CONTENTS, DTYPES, raw_bytes

NUMBERS = {name: dtype for name, dtype in DTYPES.items() if name != "BYTES"}
SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4)
BYTES = hnp.arrays(object, SHAPES, elements=st.binary(max_size=8))


def spec_for(datatype: str, rank: int) -> ModelSpec:
    tensor = TensorSpec("x", datatype, (-1,) * rank)
    return ModelSpec(name="m", inputs=(tensor,), outputs=(tensor,))


def arrays() -> st.SearchStrategy[tuple[str, Any]]:
    numbers = st.sampled_from(sorted(NUMBERS)).flatmap(
        lambda name: hnp.arrays(NUMBERS[name], SHAPES).map(lambda array: (name, array))
    )
    return st.one_of(numbers, BYTES.map(lambda array: ("BYTES", array)))


@given(arrays())
@settings(max_examples=200, deadline=None)
def test_an_output_read_as_an_input_is_the_same(case: tuple[str, Any]) -> None:
    datatype, array = case
    spec = spec_for(datatype, array.ndim)
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=[raw_bytes(datatype, array)])
    request.inputs.add(name="x", datatype=datatype, shape=array.shape)
    read = parse(request, spec).inputs["x"]
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize(("field", "datatype"), [(f, d) for f, (_, all_) in CONTENTS.items() for d in all_])
def test_typed_contents_are_read_into_the_datatype(field: str, datatype: str) -> None:
    values: list[Any] = [b"a", b""] if datatype == "BYTES" else [1, 0]
    request = pb.ModelInferRequest(model_name="m")
    tensor = request.inputs.add(name="x", datatype=datatype, shape=[2])
    getattr(tensor.contents, field).extend(values)
    read = parse(request, spec_for(datatype, 1)).inputs["x"]
    assert read.dtype == DTYPES[datatype]
    assert read.tolist() == values


def test_typed_contents_in_two_fields_are_refused() -> None:
    request = pb.ModelInferRequest(model_name="m")
    tensor = request.inputs.add(name="x", datatype="INT32", shape=[1])
    tensor.contents.bool_contents.append(True)
    tensor.contents.int_contents.append(1)
    with pytest.raises(ServiceError, match="of type 'BOOL', expected datatype 'INT32'"):
        parse(request, spec_for("INT32", 1))


@given(
    raw=st.binary(max_size=40),
    datatype=st.sampled_from(sorted(DTYPES)),
    shape=st.lists(st.one_of(st.integers(-2, 6), st.sampled_from([2**31, 2**62])), max_size=3),
)
@settings(max_examples=500, deadline=None)
def test_any_bytes_in_any_shape_are_read_or_refused(raw: bytes, datatype: str, shape: list[int]) -> None:
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=[raw])
    request.inputs.add(name="x", datatype=datatype, shape=shape)
    refusal = None
    try:
        read = parse(request, spec_for(datatype, 1)).inputs["x"]
    except ServiceError as error:
        refusal = error
    if refusal is None:
        assert list(read.shape) == shape
    else:
        assert (refusal.code, "'x'" in refusal.message) == (Code.INVALID_ARGUMENT, True)
