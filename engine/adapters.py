"""LoRA adapters without their tensors: which there are, who uses them, which of them are in the slots of the device.

    load ──► named ──a request──► held ──a row──► in a slot ──its last row ends──► idle there, until another needs it
    unload ─► nameless: new requests do not find it; those that hold it end with it, and then it is gone

A slot is memory of the device for the matrices of one adapter. What running rows use stays; of the idle ones the least
recently used gives way. Pure and torch-free: what a slot is filled with is the runner's business.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.config import ModelConfig
from engine.errors import AdapterNotFoundError
from engine.request import AdapterInfo
from engine.step import SlotFill


class Projection(NamedTuple):
    """A matrix of our decoder, and the modules of Hugging Face's Llama that are fused in it.

    Attributes:
        name: field of `engine.model.decoder.Layer`.
        modules: name within the layer -> outputs, in the order of the matrix' rows.
    """

    name: str
    inputs: int
    modules: dict[str, int]


def projections(model: ModelConfig) -> tuple[Projection, ...]:
    """The matrices of one layer, which are what an adapter may change."""
    hidden, ffn = model.hidden_size, model.intermediate_size
    qkv = {"self_attn.q_proj": model.q_size, "self_attn.k_proj": model.kv_size, "self_attn.v_proj": model.kv_size}
    return (
        Projection("qkv", hidden, qkv),
        Projection("attention_output", model.q_size, {"self_attn.o_proj": hidden}),
        Projection("gate_up", hidden, {"mlp.gate_proj": ffn, "mlp.up_proj": ffn}),
        Projection("down", ffn, {"mlp.down_proj": hidden}),
    )


def slot_size(model: ModelConfig, rank: int) -> int:
    """Numbers that an adapter of this rank on every matrix of every layer consists of."""
    per_rank = sum(len(each.modules) * each.inputs + sum(each.modules.values()) for each in projections(model))
    return model.num_layers * rank * per_rank


@dataclass(slots=True, eq=False)
class LoadedAdapter:
    """One adapter as it was loaded; loaded again under its name it is another one.

    Attributes:
        number: its own for ever.
        requests: accepted requests that want it and have not ended; rows: those of them that run.
        slot: where its matrices are on the device.
    """

    number: int
    info: AdapterInfo
    requests: int = 0
    rows: int = 0
    slot: int | None = None


@dataclass(slots=True)
class Adapters:
    """The book of all adapters. `slots` is how many can be on the device at the same time."""

    slots: int
    _names: dict[str, LoadedAdapter] = field(default_factory=dict)
    _free: list[int] = field(init=False)
    _idle: dict[LoadedAdapter, None] = field(default_factory=dict)  # in a slot, without rows; least recently used first
    _fills: list[SlotFill] = field(default_factory=list)
    _dropped: list[int] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self._free = list(range(self.slots - 1, -1, -1))

    # -- names -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """How many have a name."""
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def add(self, info: AdapterInfo) -> LoadedAdapter:
        """A new adapter under its name. One that had the name loses it, as if it were unloaded."""
        if info.name in self._names:
            self.remove(info.name)
        adapter = self._names[info.name] = LoadedAdapter(next(self._numbers), info)
        return adapter

    def remove(self, name: str) -> None:
        """Raises AdapterNotFoundError."""
        adapter = self.find(name)
        del self._names[name]
        self._drop_if_unused(adapter)

    def find(self, name: str) -> LoadedAdapter:
        """Raises AdapterNotFoundError."""
        if name not in self._names:
            raise AdapterNotFoundError(name, self._names)
        return self._names[name]

    # -- requests and rows -------------------------------------------------------------------------------------

    def hold(self, adapter: LoadedAdapter) -> None:
        """A request that wants it was accepted."""
        adapter.requests += 1

    def release(self, adapter: LoadedAdapter) -> None:
        """The request has ended."""
        adapter.requests -= 1
        self._drop_if_unused(adapter)

    def has_room(self, adapter: LoadedAdapter) -> bool:
        """It is in a slot, or there is one that no running row uses."""
        return adapter.slot is not None or bool(self._free or self._idle)

    def enter(self, adapter: LoadedAdapter) -> int:
        """A row begins to run with it; there is room. Returns its slot."""
        if adapter.slot is None:
            adapter.slot = self._free.pop() if self._free else self._evict()
            self._fills.append(SlotFill(adapter.slot, adapter.number))
        self._idle.pop(adapter, None)
        adapter.rows += 1
        return adapter.slot

    def leave(self, adapter: LoadedAdapter) -> None:
        """The row has ended or was pre-empted."""
        adapter.rows -= 1
        if adapter.rows == 0:
            self._idle[adapter] = None

    # -- what the runner has to do -----------------------------------------------------------------------------

    def take_fills(self) -> list[SlotFill]:
        """Slots that get another adapter before the next step, since the last call."""
        fills, self._fills = self._fills, []
        return fills

    def take_dropped(self) -> list[int]:
        """Numbers of adapters that nobody will ever need again, since the last call."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def _evict(self) -> int:
        victim = next(iter(self._idle))
        del self._idle[victim]
        slot, victim.slot = victim.slot, None
        assert slot is not None
        return slot

    def _drop_if_unused(self, adapter: LoadedAdapter) -> None:
        if adapter.requests or self._names.get(adapter.info.name) is adapter:
            return
        if adapter.slot is not None:
            del self._idle[adapter]
            self._free.append(adapter.slot)
            adapter.slot = None
        self._dropped.append(adapter.number)
