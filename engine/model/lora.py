"""LoRA on the device: slots of memory for adapters, and layers that add what the adapters of a step change.

    y = W x  ──►  y[:, outputs] += (x Aᵀ)[:, ranks] · Bᵀ     for each part of a fused matrix that the adapter changes,
                                                             over the tokens of the rows that run with it

Tokens of one adapter stand side by side in a step (`engine.rows` sees to it), so that they are a slice: a few small
matrix products for each adapter and matrix, whatever the mix, and nothing at all for rows without an adapter.
`reference_delta` is the same, slowly.

A slot is a flat stretch of memory that was taken at the start, so that no adapter can be one too many later; the
matrices of an adapter lie in it one after the other, at their own rank. On a CPU they are float32 whatever the rest is
computed in: oneDNN takes 12 µs for the smallest product in bfloat16, where float32 takes 1 to 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.adapters import Projection, projections, slot_size
from engine.checkpoint.lora import LowRank, read_adapter
from engine.config import ModelConfig
from engine.errors import AdapterLimitError
from engine.machine import free_memory
from engine.model.decoder import Layer
from engine.ops import Activations, floats
from engine.quant import Linear


class Part(NamedTuple):
    """The share of one module. b: [rank, outputs], contiguous, the scale in it."""

    outputs: slice
    ranks: slice
    b: Tensor


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter adds to one matrix. a: [ranks of all parts, inputs]."""

    a: Tensor
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, projection: Projection, modules: Mapping[str, LowRank]) -> Delta | None:
        """None if the adapter does not change this matrix."""
        changed, parts, output, rank = [], [], 0, 0
        for name, outputs in projection.modules.items():
            if (low_rank := modules.get(name)) is not None:
                end = rank + len(low_rank.a)
                parts.append(Part(slice(output, output + outputs), slice(rank, end), low_rank.b.t().contiguous()))
                changed.append(low_rank.a)
                rank = end
            output += outputs
        return cls(torch.cat(changed), tuple(parts)) if parts else None

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + sum(part.b.nbytes for part in self.parts)

    def placed(self, place: Callable[[Tensor], Tensor]) -> Delta:
        """The same, each matrix where `place` puts it."""
        return Delta(place(self.a), tuple(part._replace(b=place(part.b)) for part in self.parts))

    def add(self, x: Tensor, y: Tensor) -> None:
        """x: [tokens, inputs]; y: [tokens, outputs of the whole matrix], changed in place. Compute dtype."""
        hidden = x.to(self.a.dtype) @ self.a.t()
        for part in self.parts:
            changed = y[:, part.outputs]
            if changed.dtype == part.b.dtype:
                changed.addmm_(hidden[:, part.ranks], part.b)
            else:
                changed += hidden[:, part.ranks] @ part.b


Deltas = list[dict[str, Delta]]
"""Of one adapter: for each layer what it changes, by the name of the matrix in `Layer`."""


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter in host memory, ready to be copied into a slot."""

    rank: int
    deltas: Deltas

    @property
    def nbytes(self) -> int:
        return sum(delta.nbytes for layer in self.deltas for delta in layer.values())


class Segment(NamedTuple):
    """Tokens start .. stop - 1 of a step run with the adapter in `slot`."""

    slot: int
    start: int
    stop: int


class LoraPool:
    """All adapters of an engine, in host memory, and as many of them on the device as there are slots.

    `read` may be called from any thread; everything else belongs to the runner's.

    Attributes:
        nbytes: of all slots.
    """

    def __init__(self, model: ModelConfig, slots: int, max_rank: int, dtype: torch.dtype, device: torch.device) -> None:
        """
        Args:
            dtype: that the matrices are kept in and multiplied in.
        """
        self._model, self._max_rank = model, max_rank
        self._memory = torch.empty(slots, slot_size(model, max_rank), dtype=dtype, device=device)
        self._slots: list[Deltas] = [[] for _ in range(slots)]
        self._kept: dict[int, HostAdapter] = {}
        self.nbytes = self._memory.nbytes

    def read(self, path: str) -> HostAdapter:
        """An adapter from its folder.

        Raises:
            CheckpointError: it is missing, broken, or does not fit this model and the rank limit.
            AdapterLimitError: the memory of the host is full.
        """
        weights = read_adapter(Path(path), self._model, self._max_rank, self._memory.dtype)
        deltas: Deltas = []
        for modules in weights.layers:
            made = {each.name: Delta.of(each, modules) for each in projections(self._model)}
            deltas.append({name: delta for name, delta in made.items() if delta is not None})
        adapter = HostAdapter(weights.rank, deltas)
        if adapter.nbytes > (free := free_memory(torch.device("cpu"))):
            raise AdapterLimitError(f"{path}: {adapter.nbytes} bytes, but {free} bytes of the host's memory are free")
        return adapter

    def keep(self, number: int, adapter: HostAdapter) -> None:
        """From now on slots can be filled with it, by its number."""
        self._kept[number] = adapter

    def drop(self, number: int) -> None:
        """It will not be asked for again. A slot that holds it stays as it is until it is filled anew."""
        del self._kept[number]

    def fill(self, slot: int, number: int) -> None:
        """Copy an adapter into a slot, over whatever is there."""
        memory, used = self._memory[slot], 0

        def place(matrix: Tensor) -> Tensor:
            nonlocal used
            there = memory[used : used + matrix.numel()].view(matrix.shape)
            used += matrix.numel()
            return there.copy_(matrix)

        self._slots[slot] = [
            {name: delta.placed(place) for name, delta in layer.items()} for layer in self._kept[number].deltas
        ]

    def around(self, layers: Sequence[Layer], segments: Sequence[Segment]) -> Sequence[Layer]:
        """The layers as the tokens of a step see them: those of each segment with its adapter."""
        adapted = []
        for index, layer in enumerate(layers):
            added: dict[str, list[tuple[slice, Delta]]] = {}
            for slot, start, stop in segments:
                for name, delta in self._slots[slot][index].items():
                    added.setdefault(name, []).append((slice(start, stop), delta))
            changed: dict[str, Any] = {name: _Adapted(getattr(layer, name), each) for name, each in added.items()}
            adapted.append(replace(layer, **changed))
        return adapted


class _Adapted:
    """A linear map, and what adapters add to it for some of its tokens. See `engine.quant.linear.Linear`."""

    rounding = None  # adapters are trained on floats; the map rounds its own input, to the same codes

    def __init__(self, linear: Linear, deltas: list[tuple[slice, Delta]]) -> None:
        self._linear, self._deltas = linear, deltas
        self.nbytes = linear.nbytes

    def __call__(self, x: Activations) -> Tensor:
        x = floats(x)
        y = self._linear(x)
        for tokens, delta in self._deltas:
            delta.add(x[tokens], y[tokens])
        return y


def reference_delta(x: Tensor, adapters: Sequence[Mapping[str, LowRank] | None], projection: Projection) -> Tensor:
    """What LoRA adds to one matrix, token by token and module by module.

    Args:
        x: [T, inputs].
        adapters: of each token, the modules that its adapter changes in this layer; None = no adapter.

    Returns:
        float64 [T, outputs].
    """
    rows = []
    for token, modules in zip(x.double(), adapters, strict=True):
        parts = []
        for name, outputs in projection.modules.items():
            low_rank = None if modules is None else modules.get(name)
            if low_rank is None:
                parts.append(torch.zeros(outputs, dtype=torch.float64))
            else:
                parts.append(low_rank.b.double() @ (low_rank.a.double() @ token))
        rows.append(torch.cat(parts))
    return torch.stack(rows)
