"""Tensors on the wire: little-endian, row-major; BYTES elements each behind a uint32 length.

A tensor comes either in `raw_input_contents` or in the typed fields of its `contents`, and always leaves raw.
Error texts are those of Triton 2.51, which clients match on.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from tritonclient.grpc import model_config_pb2

from service.errors import Code, ServiceError
from service.grpc.kserve.model import Array, ModelSpec, TensorSpec

DTYPES = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype("O"),
}
# Field of InferTensorContents -> the datatype that Triton names for it, and those that it carries.
CONTENTS = {
    "bool_contents": ("BOOL", ("BOOL",)),
    "int_contents": ("INT32", ("INT8", "INT16", "INT32")),
    "int64_contents": ("INT64", ("INT64",)),
    "uint_contents": ("UINT32", ("UINT8", "UINT16", "UINT32")),
    "uint64_contents": ("UINT64", ("UINT64",)),
    "fp32_contents": ("FP32", ("FP32",)),
    "fp64_contents": ("FP64", ("FP64",)),
    "bytes_contents": ("BYTES", ("BYTES",)),
}
BATCH_NOTE = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended to each "
    "input shape. If you want to specify the full shape including the batch dim in your input dims config, try setting "
    "max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
)
LENGTH = struct.Struct("<I")


def config_type(datatype: str) -> int:
    """Number of a datatype in model_config.proto, where BYTES is called TYPE_STRING."""
    name = "STRING" if datatype == "BYTES" else datatype
    return int(model_config_pb2.DataType.Value(f"TYPE_{name}"))


def refused(message: str) -> ServiceError:
    return ServiceError(Code.INVALID_ARGUMENT, message)


def text_array(values: Sequence[str]) -> Array:
    """1-D BYTES array of texts."""
    return np.array([value.encode() for value in values], dtype=object)


class InputReader:
    """Decodes the inputs of one request of one model; `prefix` is `[request id: …] `."""

    def __init__(self, spec: ModelSpec, prefix: str) -> None:
        self._spec = spec
        self._prefix = prefix

    def check_shape(self, tensor: Any, spec: TensorSpec) -> tuple[int, ...]:
        """The tensor's shape, once datatype, rank and dimensions are what the model expects.

        Raises:
            ServiceError: INVALID_ARGUMENT.
        """
        model, shape = self._spec.name, tuple(tensor.shape)
        if tensor.datatype != spec.datatype:
            given = tensor.datatype if tensor.datatype in {*DTYPES, "BF16"} else "<invalid>"
            raise refused(
                f"{self._prefix}inference input '{spec.name}' data-type is '{given}', but model '{model}' expects "
                f"'{spec.datatype}'"
            )
        batched = self._spec.max_batch_size > 0
        if any(dim < 0 for dim in shape):
            raise refused(
                f"{self._prefix}All input dimensions should be specified for input '{spec.name}' for model '{model}', "
                f"got {_dims(shape)}"
            )
        accepted = [(*([self._batch_of(shape)] if batched else []), *spec.dims)]
        if self._spec.lenient:
            accepted = [spec.dims, (1, *spec.dims)]
        if not any(_matches(shape, dims) for dims in accepted):
            expected = (-1, *spec.dims) if batched else spec.dims
            raise refused(
                f"{self._prefix}unexpected shape for input '{spec.name}' for model '{model}'. Expected "
                f"{_dims(expected)}, got {_dims(shape)}. {BATCH_NOTE if batched else ''}"
            )
        return shape

    def _batch_of(self, shape: tuple[int, ...]) -> int:
        return shape[0] if shape else -1

    def array(self, tensor: Any, shape: tuple[int, ...], raw: bytes | None) -> Array:
        """The tensor's values.

        Args:
            raw: its `raw_input_contents`; None = take `contents`.

        Raises:
            ServiceError: INVALID_ARGUMENT.
        """
        # With a batch of 0 Triton expects the bytes of one item.
        count = math.prod(shape[1:] if self._spec.max_batch_size and shape and shape[0] == 0 else shape)
        values = self._typed(tensor) if raw is None else None
        if tensor.datatype == "BYTES":
            elements = self._elements(tensor.name, raw, count) if raw is not None else list(values or ())
            if len(elements) != count:
                raise refused(
                    f"{self._prefix}expected {count} string elements for inference input '{tensor.name}' for model "
                    f"'{self._spec.name}', got {len(elements)}"
                )
            array = np.empty(count, dtype=object)
            array[:] = elements
            return array.reshape(shape)
        dtype = DTYPES[tensor.datatype]
        size = len(raw) if raw is not None else len(values or ()) * dtype.itemsize
        if size != count * dtype.itemsize:
            raise refused(
                f"{self._prefix}input byte size mismatch for input '{tensor.name}' for model '{self._spec.name}'. "
                f"Expected {count * dtype.itemsize}, got {size}"
            )
        if raw is not None:
            return np.frombuffer(raw, dtype).reshape(shape)
        wide = np.dtype("<i8") if dtype.kind in "iu" and dtype.itemsize < 4 else dtype
        return np.array(values, wide).astype(dtype).reshape(shape)

    def _typed(self, tensor: Any) -> Sequence[Any]:
        """Values of the one filled field of `contents`."""
        found: Sequence[Any] = ()
        for name, (label, datatypes) in CONTENTS.items():
            values = getattr(tensor.contents, name)
            if not values:
                continue
            if found:
                raise refused(
                    f"unexpected explicit tensor data for input tensor '{tensor.name}' for model '{self._spec.name}', "
                    "binary data was already supplied."
                )
            if tensor.datatype not in datatypes:
                raise refused(
                    f"unexpected explicit tensor data for input tensor '{tensor.name}' for model '{self._spec.name}' "
                    f"of type '{label}', expected datatype '{tensor.datatype}'"
                )
            found = values
        return found

    def _elements(self, name: str, raw: bytes, count: int) -> list[bytes]:
        elements: list[bytes] = []
        at, about = 0, f"for inference input '{name}' for model '{self._spec.name}'"
        while at < len(raw):
            if len(raw) - at < LENGTH.size:
                raise refused(
                    f"{self._prefix}incomplete string length indicator {about}, expecting {LENGTH.size} bytes but only "
                    f"{len(raw) - at} bytes available. Please make sure the string length indicator is in one buffer."
                )
            if len(elements) == count:
                raise refused(
                    f"{self._prefix}unexpected number of string elements {count + 1} {about}, expecting {count}"
                )
            (length,) = LENGTH.unpack_from(raw, at)
            at += LENGTH.size
            if length > len(raw) - at:
                raise refused(
                    f"incomplete string data for inference input '{name}', expecting string of length {length} but "
                    f"only {len(raw) - at} bytes available"
                )
            elements.append(raw[at : at + length])
            at += length
        return elements


def raw_bytes(datatype: str, array: Array) -> bytes:
    """An output's values as they go into `raw_output_contents`."""
    if datatype == "BYTES":
        elements: list[bytes] = array.ravel().tolist()
        return b"".join([LENGTH.pack(len(element)) + element for element in elements])
    return np.ascontiguousarray(array, DTYPES[datatype]).tobytes()


def _matches(shape: tuple[int, ...], dims: tuple[int, ...]) -> bool:
    return len(shape) == len(dims) and all(want in (-1, have) for have, want in zip(shape, dims, strict=True))


def _dims(dims: Sequence[int]) -> str:
    return "[" + ",".join(map(str, dims)) + "]"
