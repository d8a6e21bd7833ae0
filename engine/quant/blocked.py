"""Weights in the block layout of weight.h: bfloat16, or codes of 4 to 8 bits, widened in the cache only.

    Matrix ──fill──► planes of 64-output blocks ──nemo_linear──► y
                                                     └──rows──► rows of an embedding table

A matrix arrives slab by slab, so that packing a vocabulary of 131,072 needs no second copy of it.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional

from engine.ops import Activations, Kernels, floats
from engine.ops.cpu import DTYPES
from engine.quant.activations import quantise_rows
from engine.quant.form import Form
from engine.quant.matrix import FloatMatrix, GroupMatrix, Matrix

BLOCK = 64  # outputs that lie together
_OWN_PAGES, _SHARED_PAGES = 2**22, 2**14  # bytes of a plane from which it gets huge pages, or takes part in some
_KINDS = {4: 0, 5: 1, 6: 2, 8: 3, 0: 4, 16: 5}  # enum Codes of weight.h


class _Weight(ctypes.Structure):
    """`Weight` of weight.h, field by field."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("high", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("mins", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("half_scales", ctypes.c_int32),
        ("zero", ctypes.c_float),
    )


class BlockedLinear:
    """`Linear` over the compiled kernel, for float32 and bfloat16 inputs on a CPU.

    Args:
        form: how the weights are kept.
        outputs, inputs: shape of the whole matrix; fill it before the first call.
        bias: [outputs] or None.
        wide: give float32 results.
        quantise_inputs: round the inputs to e4m3 too, with a scale per token (or the form's own): W8A8.
    """

    rounding = None  # the kernel wants codes in the input's own dtype, and makes them itself

    def __init__(
        self,
        form: Form,
        outputs: int,
        inputs: int,
        *,
        bias: Tensor | None,
        wide: bool,
        quantise_inputs: bool,
        kernels: Kernels,
    ) -> None:
        self._form, self._outputs, self._inputs, self._wide = form, outputs, inputs, wide
        self._quantise_inputs, self._kernels = quantise_inputs, kernels
        blocks, width = -(-outputs // BLOCK), inputs + inputs % 2
        self._width = width
        self._codes = self._zeros(*_code_plane(form.bits, blocks, width))
        self._high = self._zeros(*_high_plane(form.bits, blocks, width)) if form.bits in (5, 6) else None
        scales = (blocks, form.groups(inputs), BLOCK)
        self._scales = self._zeros(scales, form.scale_dtype) if form.bits != 16 else None
        self._mins = self._zeros(scales, form.scale_dtype) if form.has_mins else None
        self._bias = None if bias is None else bias.float().contiguous()
        tensors = (self._codes, self._high, self._scales, self._mins, self._bias)
        self.nbytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        self._weight = _Weight(
            *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
            width,
            outputs,
            form.group or width,
            _KINDS[form.bits],
            form.scale_dtype == torch.float16,
            form.zero,
        )

    @property
    def address(self) -> int | None:
        """Of the `Weight`, for kernels that call nemo_linear themselves; None if that is not all that a call does."""
        plain = self._width == self._inputs and not self._quantise_inputs
        return ctypes.addressof(self._weight) if plain else None

    def fill(self, start: int, matrix: Matrix) -> None:
        """Put the rows of a slab in place. `start` and, but for the last, the count are whole blocks."""
        rows = matrix.shape[0]
        assert start % BLOCK == 0
        assert rows % BLOCK == 0 or start + rows == self._outputs
        codes = matrix.values.bfloat16() if isinstance(matrix, FloatMatrix) else matrix.codes.view(torch.uint8)
        codes = codes.contiguous()
        self._kernels.library.nemo_pack(
            ctypes.byref(self._weight), codes.data_ptr(), start, rows, self._inputs, self._kernels.threads
        )
        where = slice(start // BLOCK, -(-(start + rows) // BLOCK))
        if self._scales is not None:
            assert not isinstance(matrix, FloatMatrix)
            self._scales[where] = _in_blocks(matrix.scales)
        if self._mins is not None:
            assert isinstance(matrix, GroupMatrix)
            self._mins[where] = _in_blocks(matrix.mins)
        if start + rows == self._outputs:
            self._gather()

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros, in huge pages if there are many: asked for before they are written, those cost nothing."""
        plane = torch.empty(shape, dtype=dtype)
        if plane.nbytes >= _OWN_PAGES:
            self._kernels.library.nemo_use_huge_pages(plane.data_ptr(), plane.nbytes, False)
        return plane.zero_()

    def _gather(self) -> None:
        """Move what is smaller into huge pages too; neighbours on the heap share them."""
        for plane in (self._codes, self._high, self._scales, self._mins):
            if plane is not None and _SHARED_PAGES <= plane.nbytes < _OWN_PAGES:
                self._kernels.library.nemo_use_huge_pages(plane.data_ptr(), plane.nbytes, True)

    def __call__(self, x: Activations) -> Tensor:
        x = floats(x)
        if self._width != self._inputs:
            x = functional.pad(x, (0, 1))
        scales = None
        if self._quantise_inputs:
            x, scales = quantise_rows(x, self._form.input_scale, self._kernels)
        out = x.new_empty(len(x), self._outputs, dtype=torch.float32 if self._wide else x.dtype)
        self._kernels.library.nemo_linear(
            DTYPES[x.dtype],
            self._wide,
            ctypes.byref(self._weight),
            x.data_ptr(),
            0 if scales is None else scales.data_ptr(),
            out.data_ptr(),
            len(x),
            self._kernels.threads,
        )
        return out

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the weight, so that an embedding tied to the head needs no copy of its own: int64 [n] -> [n, inputs].

        bfloat16 if the weight is kept so, else float32.
        """
        block, lane = index // BLOCK, index % BLOCK
        numbers = self._numbers(self._codes[block, :, lane], block, lane)[:, : self._inputs]
        if self._scales is None:
            return numbers.contiguous()  # an odd width is padded
        scales = self._scales[block, :, lane].float()
        mins = self._form.zero * scales if self._mins is None else self._mins[block, :, lane].float()
        group = self._form.group or self._inputs
        scales, mins = (each.repeat_interleave(group, 1)[:, : self._inputs] for each in (scales, mins))
        return numbers * scales - mins

    def _numbers(self, codes: Tensor, block: Tensor, lane: Tensor) -> Tensor:
        """Codes of some outputs, [n, pairs (or quads of pairs), 2], as numbers [n, width]."""
        match self._form.bits:
            case 16:
                return codes.flatten(1)
            case 8:
                return codes.flatten(1).view(torch.int8).float()
            case 0:
                return codes.flatten(1).view(torch.float8_e4m3fn).float()
        low = _spread_bits(codes, 4)
        return low if self._high is None else low + 16 * _spread_bits(self._high[block, :, lane], self._form.bits - 4)


def _code_plane(bits: int, blocks: int, width: int) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype."""
    if bits in (4, 5, 6):
        return (blocks, width // 8, BLOCK, 2), torch.int16
    return (blocks, width // 2, BLOCK, 2), torch.bfloat16 if bits == 16 else torch.uint8


def _high_plane(bits: int, blocks: int, width: int) -> tuple[tuple[int, ...], torch.dtype]:
    """The same for the bits above the fourth: 16 bits of a lane are 16 pairs of inputs at 5 bits, 8 pairs at 6."""
    return (blocks, width * (bits - 4) // 32, BLOCK, 2), torch.int16


def _spread_bits(lanes: Tensor, count: int) -> Tensor:
    """int16 [n, m, 2], `count` bits of each code from the lowest bit on -> float32 [n, m * 32 / count]."""
    shifts = torch.arange(0, 16, count, dtype=torch.int32)
    numbers: Tensor = (lanes.int().unsqueeze(2) >> shifts.view(1, 1, -1, 1)) & (2**count - 1)
    return numbers.flatten(1).float()


def _in_blocks(values: Tensor) -> Tensor:
    """[rows, groups] -> [blocks, groups, 64], padded with zeros."""
    return functional.pad(values, (0, 0, 0, -len(values) % BLOCK)).view(-1, BLOCK, values.shape[1]).transpose(1, 2)
