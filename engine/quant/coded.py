"""Coded weights on a GPU, and on a CPU without a compiler: which product serves which number of rows.

Matrix ──fill──► CodedWeight ─┬─ Triton: few rows stream the codes                       on CUDA
                              ├─ torch._scaled_mm: matrix units of FP8                   there, many rows of W8A8
                              ├─ decoded a slab at a time, then torch.mm                 anywhere: the reference
                              └─ rows of an embedding table
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from engine.limits import DECODE_SLAB
from engine.ops import Activations, CodedWeight, Quantised, Rounding, has_triton
from engine.ops.reference import quantise_tokens
from engine.quant.form import Form
from engine.quant.linear import nbytes
from engine.quant.matrix import FloatMatrix, GroupMatrix, Matrix

# Rows from which on the matrix units of FP8 serve W8A8. Below, a product is the bytes of its weight, which our kernel
# streams in whole; cuBLAS has its tiles of 64 rows mostly empty, and up to 16 is known to be slow (vLLM pads to 17).
UNITS_FROM = 17
_CHUNK = 32  # inputs that CodedWeight packs together
_ALIGNED = 128  # outputs: a slab of any number takes a matrix product of cuBLAS three times as long


class Products(Protocol):
    """What a device brings: `engine.ops.triton.linear.TritonProducts`."""

    def takes(self, weight: CodedWeight) -> bool:
        """Whether `multiply` can."""

    def most_rows(self, weight: CodedWeight) -> int:
        """Rows that `multiply` takes at most."""

    def multiply(self, x: Activations, weight: CodedWeight, bias: Tensor | None, wide: bool) -> Tensor:
        """x · weightᵀ + bias: [rows, outputs] in x's dtype, or in float32 if `wide`."""

    def decode(self, weight: CodedWeight, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Some rows of a weight as numbers: [stop - start, inputs]."""

    def quantise(self, x: Tensor, rounding: Rounding) -> Quantised:
        """`reference.quantise_tokens`."""


class CodedLinear:
    """`Linear` over codes in the layout of `CodedWeight`.

    Args:
        form: how the weights are coded.
        outputs, inputs: shape of the whole matrix; fill it before the first call.
        bias: [outputs] on the device, or None.
        wide: give float32 results.
        quantise_inputs: round the inputs to e4m3 too, with a scale per token (or the form's own): W8A8.
        products: of the device; None = plain torch.
        units: the device has matrix units of FP8.
    """

    def __init__(
        self,
        form: Form,
        outputs: int,
        inputs: int,
        *,
        bias: Tensor | None,
        wide: bool,
        quantise_inputs: bool,
        device: torch.device,
        products: Products | None = None,
        units: bool = False,
    ) -> None:
        self._form, self._bias, self._wide = form, bias, wide
        self.rounding = Rounding(form.input_scale) if quantise_inputs else None
        high = form.bits - 4 if form.bits in (5, 6) else 0
        chunks = -(-inputs // _CHUNK)
        if form.bits == 0:
            codes = torch.empty(outputs, inputs, dtype=torch.float8_e4m3fn, device=device)
        else:
            depth = inputs if form.bits == 8 else chunks * _CHUNK // 2
            codes = torch.empty(depth, outputs, dtype=torch.uint8, device=device)
        scales = (form.groups(inputs), outputs)
        self._weight = CodedWeight(
            codes=codes,
            high=torch.empty(chunks * 4 * high, outputs, dtype=torch.uint8, device=device) if high else None,
            scales=torch.empty(scales, dtype=form.scale_dtype, device=device),
            mins=torch.empty(scales, dtype=form.scale_dtype, device=device) if form.has_mins else None,
            bits=form.bits,
            group=form.group,
            outputs=outputs,
            inputs=inputs,
        )
        self._products = products if products is not None and products.takes(self._weight) else None
        self._streamed = 0 if self._products is None else self._products.most_rows(self._weight)
        # They give bfloat16, whose rounding `wide` is there to avoid.
        self._units = units and not wide and form.bits == 0 and form.group == 0 and not (outputs % 16 or inputs % 16)
        weight = self._weight
        self.nbytes = nbytes(weight.codes, weight.high, weight.scales, weight.mins, bias)

    def fill(self, start: int, matrix: Matrix) -> None:
        """Put the rows of a slab in place."""
        assert not isinstance(matrix, FloatMatrix)
        weight, where = self._weight, slice(start, start + len(matrix.codes))
        codes = matrix.codes.to(weight.codes.device)
        if weight.bits == 0:
            weight.codes[where] = codes
        elif weight.bits == 8:
            weight.codes[:, where] = codes.t()
        else:
            chunks = functional.pad(codes, (0, -weight.inputs % _CHUNK)).t().reshape(-1, _CHUNK, len(codes))
            weight.codes[:, where] = _pack(chunks & 15, 4)
            if weight.high is not None:
                weight.high[:, where] = _pack(chunks >> 4, weight.bits - 4)
        weight.scales[:, where] = matrix.scales.to(weight.scales).t()
        if weight.mins is not None:
            assert isinstance(matrix, GroupMatrix)
            weight.mins[:, where] = matrix.mins.to(weight.mins).t()

    def __call__(self, x: Activations) -> Tensor:
        """See the picture above. Whoever rounds x, the codes are the same."""
        if self.rounding is not None and isinstance(x, Tensor):
            x = (self._products.quantise if self._products else quantise_tokens)(x, self.rounding)
        if self._units and isinstance(x, Quantised) and (self._products is None or len(x) >= UNITS_FROM):
            return self._multiply_fp8(x)
        if self._products is not None and len(x) <= self._streamed:
            return self._products.multiply(x, self._weight, self._bias, self._wide)
        return self._multiply_decoded(x)

    def _multiply_fp8(self, x: Quantised) -> Tensor:
        y = torch._scaled_mm(
            x.codes,
            self._weight.codes.t(),
            scale_a=x.scales.unsqueeze(-1),
            scale_b=self._weight.scales,
            out_dtype=torch.bfloat16,
        )
        if self._bias is not None:
            y = y + self._bias
        return y.to(x.dtype)

    def _multiply_decoded(self, x: Activations) -> Tensor:
        numbers, scales = (x, None) if isinstance(x, Tensor) else (x.codes.to(x.dtype), x.scales)
        outputs, step = self._weight.outputs, max(1, DECODE_SLAB // self._weight.inputs // _ALIGNED) * _ALIGNED
        mixed = self._wide and numbers.is_cuda and x.dtype != torch.float32  # only CUDA multiplies them into float32
        y = numbers.new_empty(len(x), outputs, dtype=torch.float32 if mixed else x.dtype)
        for start in range(0, outputs, step):
            stop = min(start + step, outputs)
            weight, part = self._slab(start, stop, x.dtype).t(), y[:, start:stop]
            if mixed:
                torch.mm(numbers, weight, out_dtype=torch.float32, out=part)
            else:
                torch.mm(numbers, weight, out=part)
        if scales is not None:
            y *= scales.unsqueeze(-1)
        if self._bias is not None:
            y += self._bias
        return y.float() if self._wide else y

    def _slab(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        if self._products is not None:
            return self._products.decode(self._weight, start, stop, dtype)
        return self._decode(slice(start, stop)).to(dtype)

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the weight, decoded: int64 [n] -> float32 [n, inputs]."""
        return self._decode(index).contiguous()

    def _decode(self, where: Tensor | slice) -> Tensor:
        """float32 [rows, inputs]."""
        form, weight = self._form, self._weight
        scales = weight.scales[:, where].float().t()
        mins = form.zero * scales if weight.mins is None else weight.mins[:, where].float().t()
        if form.bits == 0:
            numbers = weight.codes.view(torch.uint8)[where].view(torch.float8_e4m3fn).float()  # CUDA gathers no float8
        elif form.bits == 8:
            numbers = weight.codes[:, where].t().float() - 128  # bytes are unsigned here
        else:
            numbers = _unpack(weight.codes[:, where], 4)
            if weight.high is not None:
                numbers = numbers + 16 * _unpack(weight.high[:, where], form.bits - 4)
            numbers = numbers[: weight.inputs].t().float()
        if form.group:
            scales, mins = (each.repeat_interleave(form.group, 1)[:, : weight.inputs] for each in (scales, mins))
        return numbers * scales - mins


def has_fp8_units(device: torch.device) -> bool:
    """Ada, Hopper and later multiply e4m3."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def find_products(device: torch.device) -> Products | None:
    """Our kernels, where Triton runs."""
    if not has_triton(device):
        return None
    from engine.ops.triton.linear import TritonProducts  # needs Triton, which is not everywhere

    return TritonProducts.on(device)


def _pack(chunks: Tensor, count: int) -> Tensor:
    """Values below 2 ** count, uint8 [chunks, 32, n] -> uint8 [chunks * 4 * count, n], as `CodedWeight` has them."""
    parts = chunks.reshape(len(chunks), 8 // count, 4 * count, -1)
    out = torch.zeros_like(parts[:, 0])
    for i in range(8 // count):
        out |= parts[:, i] << (i * count)
    return out.flatten(0, 1)


def _unpack(packed: Tensor, count: int) -> Tensor:
    """uint8 [chunks * 4 * count, n] -> uint8 [chunks * 32, n], undoing `_pack`."""
    shifts = torch.arange(0, 8, count, dtype=torch.uint8, device=packed.device)
    codes: Tensor = packed.reshape(-1, 1, 4 * count, packed.shape[1]) >> shifts[:, None, None]
    codes &= 2**count - 1
    return codes.flatten(0, 2)
