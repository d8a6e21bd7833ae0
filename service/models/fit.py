"""What fits where: the engine's own memory plan, for a model on disk or by name, on this machine or on any GPU.

Subject (shape, bytes of its weights) ─┐
Place   (free memory, what it is)     ─┼─► fit ─► Fit: the plan, tokens, sequences, or why not
EngineConfig (what serve would say)   ─┘
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine import EngineConfig, EngineConfigError, ModelConfig
from engine.limits import LEAST_CAPABILITY
from engine.memory import CUDA_CONTEXT, Device, MemoryPlan, context_limit, parameter_count, plan_memory, weight_bytes
from engine.parallel.share import share_of
from engine.probe import Machine, Weights
from engine.schemes import SCHEMES
from engine.sizing import cache_budget, check_config, size_cache
from service.models.catalog import CatalogEntry
from service.models.gpus import FP8_SINCE, KnownGpu, recognise
from service.models.machine import GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A device to plan for.

    Attributes:
        slug: its part of a profile's id.
        kind: "cpu" or "cuda".
        free: bytes that nobody has taken; on a GPU after the context was made.
        float_bytes: of the compute dtype.
        multiplies_fp8: it has units for FP8; None where nobody knows.
        kernels: the engine's own compute, on a GPU those in Triton; else plain torch does, which takes more memory for
            a step.
    """

    slug: str
    name: str
    kind: str
    free: int
    float_bytes: int = 2
    multiplies_fp8: bool | None = None
    kernels: bool = True

    @classmethod
    def of_gpu(cls, gpu: KnownGpu) -> Place:
        return cls(
            slug=gpu.slug,
            name=gpu.name,
            kind="cuda",
            free=gpu.memory_bytes - CUDA_CONTEXT,
            multiplies_fp8=gpu.multiplies_fp8,
            kernels=gpu.capability >= LEAST_CAPABILITY,
        )

    @classmethod
    def of_size(cls, gib: float) -> Place:
        """A GPU of which only the memory is known, and that it is recent enough for the kernels is assumed."""
        return cls(slug="gpu", name=f"a GPU with {gib:g} GiB", kind="cuda", free=max(int(gib * GIB) - CUDA_CONTEXT, 0))

    @classmethod
    def here(cls, machine: Machine) -> Place:
        """The device of this machine that the engine would take."""
        float_bytes = 4 if machine.dtype == "float32" else 2
        if machine.device == "cpu":
            return cls(
                slug="cpu",
                name="this machine's CPU",
                kind="cpu",
                free=machine.free_bytes,
                float_bytes=float_bytes,
                kernels=machine.kernels,
            )
        gpu = machine.gpus[0]
        known = recognise(gpu.name, gpu.memory_bytes)
        return cls(
            slug=known.slug if known else "gpu",
            name=f"this machine's {gpu.name}",
            kind="cuda",
            free=gpu.free_bytes,
            float_bytes=float_bytes,
            multiplies_fp8=gpu.capability >= FP8_SINCE,
            kernels=machine.triton_lacks is None and gpu.capability >= LEAST_CAPABILITY,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to plan for.

    Attributes:
        shape: of all of it.
        stored: the precision that its file is nearest to; None where the catalogue does not know the file.
        nbytes: weights of a rank in each precision, where the file was looked at; else they follow from the shape.
        refused: precision -> why the file cannot be kept so.
    """

    name: str
    shape: ModelConfig
    stored: str | None = None
    nbytes: Mapping[str, int] | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_entry(cls, entry: CatalogEntry) -> Subject:
        return cls(name=entry.name, shape=entry.shape, stored=entry.stored)

    @classmethod
    def of_file(cls, name: str, weights: Weights, stored: str | None = None) -> Subject:
        return cls(name=name, shape=weights.model, stored=stored, nbytes=weights.nbytes, refused=weights.refused)

    @property
    def parameters(self) -> int:
        return parameter_count(self.shape)

    def weight_bytes(self, precision: str, float_bytes: int, share: ModelConfig) -> int:
        """What a rank has to hold; 0 for a precision that is refused.

        Args:
            share: the rank's, of the shape.
        """
        if self.nbytes is not None:
            return self.nbytes.get(precision, 0)
        kept = self.stored if precision == "auto" and self.stored else precision
        return weight_bytes(share, SCHEMES[kept], float_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """One model in one precision at one place.

    Attributes:
        ranks: that share the model; the plan is of each of them.
        context: tokens of the longest sequence that is wanted.
        taken: tokens of the KV cache that `serve` would allocate: on a GPU all that fit, on a CPU what it needs.
        longest: tokens of the longest sequence that `serve` could be asked for.
        reason: why it does not fit; None if it does.
    """

    precision: str
    kv_precision: str
    ranks: int
    plan: MemoryPlan
    context: int
    taken: int
    longest: int
    reason: str | None

    @property
    def tokens(self) -> int:
        """That the KV cache can hold."""
        return 0 if self.reason else self.plan.tokens

    @property
    def sequences(self) -> int:
        """Of `context` tokens that the KV cache can hold at a time, in whole pages each."""
        page = self.plan.page_size
        return self.tokens // (-(-self.context // page) * page)

    @property
    def tight(self) -> bool:
        """It has room, but not for one sequence of `context` tokens: `serve` takes shorter ones, or must be told to."""
        return not self.plan.missing and 2 <= self.longest < self.context

    def as_json(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "precision": self.precision,
            "kv_precision": self.kv_precision,
            "tensor_parallel_size": self.ranks,
            "fits": self.reason is None,
            "reason": self.reason,
            "free_bytes": plan.free,
            "weight_bytes": plan.weights,
            "table_bytes": plan.tables,
            "adapter_bytes": plan.adapters,
            "workspace_bytes": plan.workspace,
            "reserve_bytes": plan.reserve,
            "kv_cache_bytes": plan.cache,
            "bytes_per_token": plan.token_bytes,
            "tokens": self.tokens,
            "tokens_by_default": self.taken,
            "max_model_len": self.context,
            "longest_sequence": self.longest,
            "tight": self.tight,
            "sequences": self.sequences,
        }


def fit(subject: Subject, place: Place, options: EngineConfig) -> Fit:
    """Plan as the engine does at its start; `options` may ask for a precision, a context, a batch and several ranks, of
    each of which the plan is.

    Raises:
        EngineConfigError: the options are wrong for any model.
    """
    check_config(options)
    ranks = options.tensor_parallel_size
    free = place.free // ranks if place.kind == "cpu" else place.free
    device = Device(kind=place.kind, free=free, float_bytes=place.float_bytes, plain=not place.kernels)
    share, taken, reason = subject.shape, 0, subject.refused.get(options.precision)
    try:
        share = share_of(subject.shape, ranks)
    except EngineConfigError as error:
        reason = str(error)
    plan = plan_memory(share, options, device, subject.weight_bytes(options.precision, place.float_bytes, share))
    refused = reason is not None
    if reason is None:
        try:
            taken = size_cache(options, share, plan, place.kind).num_pages * plan.page_size
        except EngineConfigError as error:
            reason = _lack(plan) if plan.missing else str(error)
    return Fit(
        precision=options.precision,
        kv_precision=options.kv_precision,
        ranks=ranks,
        plan=plan,
        context=options.max_model_len or context_limit(subject.shape),
        taken=taken,
        longest=0 if refused or plan.missing else _longest(options, subject.shape, plan, place.kind),
        reason=reason,
    )


def _longest(options: EngineConfig, shape: ModelConfig, plan: MemoryPlan, device: str) -> int:
    budget = min(cache_budget(options, plan, device), plan.cache)
    return min(budget // (plan.page_size * plan.token_bytes) * plan.page_size, context_limit(shape))


def _lack(plan: MemoryPlan) -> str:
    weights, compute = plan.weights / GIB, (plan.tables + plan.adapters + plan.workspace + plan.reserve) / GIB
    free, missing = plan.free / GIB, plan.missing / GIB
    return f"{missing:.2f} GiB short: {weights:.2f} GiB of weights and {compute:.2f} to compute with, {free:.2f} free"
