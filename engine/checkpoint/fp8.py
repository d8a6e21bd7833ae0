"""FP8 weights of every publisher as one `Fp8Matrix`: codes from the file, a scale for each row, or row and block.

What the configuration claims is held against the tensors that are there before a weight is read: scales that are
missing, of the wrong shape or not positive, layers that should be coded and are not, or the other way round. The scales
are few (10 million numbers at most, for 12 billion weights) and stay in memory until the checkpoint is closed.

    tensor    [] or [1]                 ──► the same for each row
    channel   [outputs] or [outputs, 1] ──► one for each row, in rotate-half order
    block     [outputs / 128, inputs / 128, rounded up] ──► each row of scales for 128 rows

A file may have scales for a KV cache in FP8 too. They are checked and not used: ours has a scale for each token and
head, taken from what is written, which is finer than one for all that calibration saw.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.checkpoint.files import FP8, SafetensorsFiles
from engine.checkpoint.fp8_config import Fp8Claims, Fp8Scheme, Per
from engine.errors import CheckpointError
from engine.quant.matrix import Fp8Matrix

_ENDS = ("model.embed_tokens.weight", "lm_head.weight")  # kept as floats by default, whatever is said of other layers
_WEIGHT_SCALES = ("weight_scale", "weight_scale_inv")  # the second multiplies too, despite its name
_INPUT_SCALES = ("input_scale", "activation_scale")
_KV_SCALE = re.compile(
    r"model\.layers\.\d+\.self_attn\.(?:(?:attn\.)?(?:q|k|v|kv)_scale|[qkv]_proj\.(?:[kv]_scale|output_scale))",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Fp8Scales:
    """Of one matrix.

    Attributes:
        values: float32 [row groups, input groups].
        rows: that share a row of `values`.
        block: inputs that share a scale; None = all.
        inputs: scale of a static scheme for the inputs.
    """

    values: Tensor
    rows: int
    block: int | None
    inputs: float | None

    def matrix(self, codes: Tensor, start: int) -> Fp8Matrix:
        """Codes of rows start, start + 1, … with their scales."""
        index = torch.arange(start, start + len(codes)) // self.rows
        return Fp8Matrix(codes, self.values[index], self.block, self.inputs)


def is_scale(name: str) -> bool:
    """A tensor beside the weights, under Hugging Face's names."""
    return name.rpartition(".")[2] in (*_WEIGHT_SCALES, *_INPUT_SCALES) or _KV_SCALE.fullmatch(name) is not None


class Fp8Reader:
    """Finds and checks the scales of one checkpoint.

    Args:
        files: where they are.
        stored: our names of all tensors -> theirs.
        claims: of the configuration; None = it says that there are none.
        reorder: puts rows of a matrix, given its name, into rotate-half order.
    """

    def __init__(
        self,
        files: SafetensorsFiles,
        stored: Mapping[str, str],
        claims: Fp8Claims | None,
        reorder: Callable[[str, Tensor], Tensor],
    ) -> None:
        self._files, self._stored, self._claims, self._reorder = files, stored, claims, reorder

    def scales(self, matrices: Mapping[str, tuple[int, int]]) -> dict[str, Fp8Scales]:
        """Of each matrix that is coded, by its name.

        Args:
            matrices: name -> [outputs, inputs] of all.

        Raises:
            CheckpointError: files and configuration do not agree, or a scale is none.
        """
        found = {}
        left = {name for name in self._stored if is_scale(name)}
        for name, shape in matrices.items():
            scheme = self._scheme(name)
            if scheme is not None:
                found[name] = self._of(name, shape, scheme, left)
        for name in sorted(left):
            if not _KV_SCALE.fullmatch(name):
                raise self._wrong(name, "is a scale, but of no FP8 weight")
            self._read(name)
        return found

    def _scheme(self, name: str) -> Fp8Scheme | None:
        """How a matrix is coded, where tensors and configuration agree; None = it has floats."""
        module = name.removesuffix(".weight")
        names = (module, self._stored[name].removesuffix(".weight"))
        claimed = self._claims.scheme_of(names) if self._claims else None
        dtype = self._files.tensors[self._stored[name]].dtype
        if dtype == FP8:
            if self._claims is None:
                raise self._wrong(name, f"is {FP8}, but no configuration says how it is scaled (quantization_config)")
            if claimed is None:
                raise self._wrong(name, f"is {FP8}, but {self._claims.where} leaves it out")
            return claimed
        if claimed is not None and name not in _ENDS:
            assert self._claims is not None
            raise self._wrong(name, f"is {dtype}, but {self._claims.where} says FP8 and does not leave it out")
        return None

    def _of(self, name: str, shape: tuple[int, int], scheme: Fp8Scheme, left: set[str]) -> Fp8Scales:
        module = name.removesuffix("weight")
        scale = self._take(module, _WEIGHT_SCALES, left)
        if scale is None:
            raise self._wrong(name, f"has no {module}{_WEIGHT_SCALES[0]}")
        values, rows, block = self._shaped(scale, name, shape, scheme)
        inputs = self._take(module, _INPUT_SCALES, left)
        if scheme.static != (inputs is not None):
            fault = "static, but it has no" if scheme.static else "dynamic, but it has an"
            assert self._claims is not None
            raise self._wrong(name, f"has inputs that {self._claims.where} calls {fault} {_INPUT_SCALES[0]}")
        return Fp8Scales(values, rows, block, None if inputs is None else self._number(inputs))

    def _shaped(
        self, name: str, matrix: str, shape: tuple[int, int], scheme: Fp8Scheme
    ) -> tuple[Tensor, int, int | None]:
        """Scales as a table, how many rows share one of its rows, and how many inputs one of its columns."""
        outputs, inputs = shape
        values = self._read(name)
        per_tensor, per_channel = [(), (1,), (1, 1)], [(outputs,), (outputs, 1)]
        match scheme.per:
            case Per.TENSOR:
                allowed = per_tensor
            case Per.CHANNEL:
                allowed = per_channel
            case Per.TENSOR_OR_CHANNEL:
                allowed = [*per_tensor, *per_channel]
            case Per.BLOCK:
                rows, block = scheme.block
                allowed = [(-(-outputs // rows), -(-inputs // block))]
        if tuple(values.shape) not in allowed:
            shapes = " or ".join(str(list(each)) for each in allowed)
            raise self._wrong(
                name, f"has shape {list(values.shape)}; scaled per {scheme.per.value}, {shape} needs {shapes}"
            )
        if scheme.per is Per.BLOCK:
            return values, rows, block
        if values.numel() == 1:
            return values.view(1, 1), outputs, None
        return self._reorder(matrix, values.view(outputs, 1)), 1, None

    def _take(self, module: str, kinds: tuple[str, ...], left: set[str]) -> str | None:
        """The one scale of a kind that a module has, off the list of those that are left."""
        names = [module + kind for kind in kinds if module + kind in left]
        if len(names) > 1:
            raise self._wrong(names[0], f"is there beside {names[1]}")
        left.difference_update(names)
        return names[0] if names else None

    def _number(self, name: str) -> float:
        values = self._read(name)
        if values.numel() != 1:
            raise self._wrong(name, f"has shape {list(values.shape)}; a scale of inputs is one number")
        return values.item()

    def _read(self, name: str) -> Tensor:
        """float32; each a positive number."""
        values = self._files.read(self._stored[name]).float()
        if values.numel() == 0 or not bool((values.isfinite() & (values > 0)).all()):
            raise self._wrong(name, "is a scale, but not all of it is positive and finite")
        return values

    def _wrong(self, name: str, fault: str) -> CheckpointError:
        stored = self._stored.get(name, name)
        path = self._files.tensors[stored].path if stored in self._files.tensors else ""
        return CheckpointError(f"{path}: tensor {stored} {fault}")
