"""Coded weights in plain torch, for a GPU and for a CPU without a compiler: decoded for each product, a slab at a time.

FP8 with FP8 activations is the exception: GPUs that multiply e4m3 do it without decoding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from engine.quant.activations import quantise_rows, to_e4m3
from engine.quant.form import Form
from engine.quant.matrix import FloatMatrix, GroupMatrix, Matrix
from engine.schemes import DECODE_SLAB


class CodedLinear:
    """Codes row by row as [outputs, bytes], the bits above the fourth in a plane of their own.

    Args:
        form: how the weights are coded.
        outputs, inputs: shape of the whole matrix; fill it before the first call.
        bias: [outputs] on the device, or None.
        wide: give float32 results.
        quantise_inputs: round the inputs to e4m3 too, with a scale per token (or the form's own): W8A8.
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
    ) -> None:
        self._form, self._bias, self._wide, self._quantise_inputs = form, bias, wide, quantise_inputs
        self._inputs = inputs
        packed, high = form.bits in (4, 5, 6), form.bits in (5, 6)
        stored = torch.float8_e4m3fn if form.bits == 0 else torch.uint8
        self._codes = torch.empty(outputs, -(-inputs // 2) if packed else inputs, dtype=stored, device=device)
        planes = (outputs, -(-inputs * (form.bits - 4) // 8))
        self._high = torch.empty(planes, dtype=torch.uint8, device=device) if high else None
        scales = (outputs, form.groups(inputs))
        self._scales = torch.empty(scales, dtype=form.scale_dtype, device=device)
        self._mins = torch.empty(scales, dtype=form.scale_dtype, device=device) if form.has_mins else None
        tensors = (self._codes, self._high, self._scales, self._mins, bias)
        self.nbytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        whole_rows = form.bits == 0 and form.group == 0
        self._multiplies = (
            quantise_inputs and whole_rows and has_fp8_units(device) and not (outputs % 16 or inputs % 16)
        )

    def fill(self, start: int, matrix: Matrix) -> None:
        """Put the rows of a slab in place."""
        assert not isinstance(matrix, FloatMatrix)
        where = slice(start, start + len(matrix.codes))
        codes = matrix.codes.to(self._codes.device)
        self._codes[where] = _pack(codes, 0, 4) if self._form.bits in (4, 5, 6) else codes
        if self._high is not None:
            self._high[where] = _pack(codes, 4, self._form.bits - 4)
        self._scales[where] = matrix.scales.to(self._scales)
        if self._mins is not None:
            assert isinstance(matrix, GroupMatrix)
            self._mins[where] = matrix.mins.to(self._mins)

    def __call__(self, x: Tensor) -> Tensor:
        if self._multiplies:
            return self._multiply_fp8(x)
        dtype, scales = x.dtype, None
        if self._quantise_inputs:
            x, scales = quantise_rows(x, self._form.input_scale)
        step = max(1, DECODE_SLAB // self._inputs)
        slabs = [
            functional.linear(x, self._decode(slice(at, at + step)).to(x.dtype)) for at in range(0, len(self), step)
        ]
        y = (torch.cat(slabs, dim=-1) if len(slabs) > 1 else slabs[0]).float()
        if scales is not None:
            y = y * scales.unsqueeze(-1)
        if self._bias is not None:
            y = y + self._bias
        return y if self._wide else y.to(dtype)

    def _multiply_fp8(self, x: Tensor) -> Tensor:
        codes, scales = to_e4m3(x, self._form.input_scale)
        y = torch._scaled_mm(
            codes,
            self._codes.t(),
            scale_a=scales.unsqueeze(-1),
            scale_b=self._scales.t(),
            out_dtype=torch.bfloat16,
        )
        if self._bias is not None:
            y = y + self._bias
        return y.float() if self._wide else y.to(x.dtype)

    def __len__(self) -> int:
        return len(self._codes)

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the weight, decoded: int64 [n] -> float32 [n, inputs]."""
        return self._decode(index)

    def _decode(self, where: Tensor | slice) -> Tensor:
        """float32 [rows, inputs]."""
        form = self._form
        codes = self._codes.view(torch.uint8)[where].view(self._codes.dtype)  # as bytes: CUDA gathers no float8
        numbers = (_unpack(codes, 4) if form.bits in (4, 5, 6) else codes).float()[:, : self._inputs]
        if self._high is not None:
            numbers += 16 * _unpack(self._high[where], form.bits - 4)[:, : self._inputs]
        scales = self._scales[where].float()
        zero = 128.0 if form.bits == 8 else form.zero  # bytes are unsigned here
        mins = zero * scales if self._mins is None else self._mins[where].float()
        if form.group:
            scales, mins = (each.repeat_interleave(form.group, 1)[:, : self._inputs] for each in (scales, mins))
        return numbers * scales - mins


def has_fp8_units(device: torch.device) -> bool:
    """Ada, Hopper and later multiply e4m3."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _pack(codes: Tensor, first: int, count: int) -> Tensor:
    """uint8 [n, width] -> uint8 [n, width * count / 8]: `count` bits from bit `first` on, the first code lowest."""
    per_byte = 8 // count
    codes = functional.pad(codes, (0, -codes.shape[1] % per_byte))
    out = torch.zeros(len(codes), codes.shape[1] // per_byte, dtype=torch.uint8, device=codes.device)
    for i in range(per_byte):
        out |= ((codes[:, i::per_byte] >> first) & (2**count - 1)) << (i * count)
    return out


def _unpack(packed: Tensor, count: int) -> Tensor:
    """uint8 [n, m] -> uint8 [n, m * 8 / count], undoing `_pack`."""
    shifts = torch.arange(0, 8, count, dtype=torch.uint8, device=packed.device)
    codes: Tensor = (packed.unsqueeze(-1) >> shifts) & (2**count - 1)
    return codes.flatten(1)
