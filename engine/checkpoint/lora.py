"""LoRA adapters (arXiv 2106.09685) from files: PEFT's, and those that mistral-finetune saves.

    W ──► W + scale · B · A          A [rank, inputs], B [outputs, rank]; the scale is multiplied into B here

    PEFT              adapter_config.json, adapter_model.safetensors; scale = alpha / r, or alpha / sqrt(r) (rsLoRA)
    mistral-finetune  params.json, lora.safetensors; the scale is in params.json; rows of wq and wk are RoPE pairs

An adapter is refused unless everything that it asks for is done: an option of its configuration that is on and not
known here, a tensor that is not used, or one that is not there would change what it says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from engine.adapters import projections
from engine.checkpoint.fields import Fields
from engine.checkpoint.files import SafetensorsFiles
from engine.checkpoint.layout import rotate_half_order
from engine.config import ModelConfig
from engine.errors import CheckpointError, UnsupportedModelError

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MISTRAL_CONFIG, MISTRAL_WEIGHTS = "params.json", "lora.safetensors"

# Keys of adapter_config.json that are read below, or do not matter once an adapter is trained. Any other must be off.
_KNOWN = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "bias"),
    *("init_lora_weights", "eva_config", "corda_config", "loftq_config", "lora_ga_config", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "lora_dropout", "inference_mode", "task_type", "auto_mapping"),
    *("base_model_name_or_path", "revision", "peft_version", "megatron_core", "qalora_group_size", "runtime_config"),
}
_OFF: tuple[object, ...] = (None, False, [], {})
_INITS = (None, True, False, "gaussian", "orthogonal", "eva")  # the others change the base model too

_MISTRAL_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


@dataclass(frozen=True, slots=True)
class LowRank:
    """What is added to one matrix, b · a. a: [rank, inputs]; b: [outputs, rank], rows in rotate-half order."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """An adapter in host memory: for each layer the modules that it changes, by their Hugging Face names."""

    layers: list[dict[str, LowRank]]

    @property
    def rank(self) -> int:
        return max(len(each.a) for layer in self.layers for each in layer.values())


class _Format(NamedTuple):
    """How one kind of file is read.

    Attributes:
        tensor: matches the names of tensors: layer, module, A or B.
        modules: its names of the modules -> ours.
        scale: from our path of a matrix, `model.layers.0.self_attn.q_proj`, and its rank.
        targets: modules that the file must be about, these and no others; None = any.
        interleaved: query and key rows are in the order of Mistral's own files.
    """

    weights: Path
    tensor: re.Pattern[str]
    modules: Mapping[str, str]
    scale: Callable[[str, int], float]
    targets: frozenset[str] | None = None
    interleaved: bool = False


def read_adapter(folder: Path, model: ModelConfig, max_rank: int, dtype: torch.dtype) -> AdapterWeights:
    """Read and check a whole adapter.

    Args:
        folder: of either kind.
        model: what it must fit.
        dtype: of the result.

    Raises:
        CheckpointError: it is missing, broken, does not fit the model, or its rank is too high.
        UnsupportedModelError: it is more than LoRA on the matrices of the layers.
    """
    modules = {name: (outputs, each.inputs) for each in projections(model) for name, outputs in each.modules.items()}
    if (folder / PEFT_CONFIG).exists():
        form = _peft(folder, list(modules))
    elif (folder / MISTRAL_WEIGHTS).exists():
        form = _mistral(folder)
    else:
        raise CheckpointError(f"{folder}: neither {PEFT_CONFIG} nor {MISTRAL_WEIGHTS} is in this folder")
    files = SafetensorsFiles([form.weights])
    try:
        layers: list[dict[str, LowRank]] = [{} for _ in range(model.num_layers)]
        for (layer, theirs), names in _pairs(form, files.shapes, model.num_layers).items():
            module = form.modules[theirs]
            rank = _check_shapes(form.weights, names, files.shapes, modules[module], max_rank)
            a, b = (files.read(name) for name in names)
            b = b.float() * form.scale(f"model.layers.{layer}.{module}", rank)
            if form.interleaved and module in ("self_attn.q_proj", "self_attn.k_proj"):
                b = rotate_half_order(b, len(b) // model.head_dim, model.head_dim)
            a, b = (_finite(form.weights, *each, dtype) for each in zip(names, (a, b), strict=True))
            layers[layer][module] = LowRank(a, b)
        return AdapterWeights(layers)
    finally:
        files.close()


def _pairs(form: _Format, shapes: Mapping[str, object], num_layers: int) -> dict[tuple[int, str], tuple[str, str]]:
    """(layer, module) -> names of A and B. Every tensor of the file is in one pair."""
    found: dict[tuple[int, str], dict[str, str]] = {}
    for name in shapes:
        match = form.tensor.fullmatch(name)
        if match is None or match[2] not in form.modules:
            raise UnsupportedModelError(
                f"{form.weights}: tensor {name} is no LoRA matrix of {', '.join(form.modules)} in a layer"
            )
        if int(match[1]) >= num_layers:
            raise CheckpointError(f"{form.weights}: tensor {name}, but the model has {num_layers} layers")
        found.setdefault((int(match[1]), match[2]), {})[match[3]] = name
    if not found:
        raise CheckpointError(f"{form.weights}: no tensors")
    targets = {form.modules[theirs] for _, theirs in found}
    if form.targets is not None and targets != form.targets:
        listed, there = (", ".join(sorted(map(_last, each))) for each in (form.targets, targets))
        raise CheckpointError(f"{form.weights}: tensors of {there}, but target_modules has {listed}")
    for pair in found.values():
        if len(pair) != 2:
            [(kind, name)] = pair.items()
            other = f"lora_{'B' if kind == 'A' else 'A'}"
            raise CheckpointError(f"{form.weights}: tensor {name} is there without its {other}")
    return {key: (pair["A"], pair["B"]) for key, pair in found.items()}


def _check_shapes(
    where: Path, names: tuple[str, str], shapes: Mapping[str, tuple[int, ...]], module: tuple[int, int], max_rank: int
) -> int:
    """The rank of a pair whose shapes are right."""
    outputs, inputs = module
    rank = shapes[names[0]][0] if shapes[names[0]] else 0
    for name, expected in zip(names, ((rank, inputs), (outputs, rank)), strict=True):
        if shapes[name] != expected or rank == 0:
            raise CheckpointError(
                f"{where}: tensor {name} has shape {list(shapes[name])}; for this model it must be "
                f"{['rank', inputs] if name == names[0] else [outputs, rank]}"
            )
    if rank > max_rank:
        raise CheckpointError(f"{where}: tensor {names[0]} has rank {rank}; max_lora_rank is {max_rank}")
    return rank


def _finite(where: Path, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    converted = tensor.to(dtype).contiguous()
    if not converted.isfinite().all():
        raise CheckpointError(f"{where}: tensor {name} has values that are not finite")
    return converted


def _peft(folder: Path, modules: list[str]) -> _Format:
    fields = Fields.of_json(folder / PEFT_CONFIG)
    if fields.raw("peft_type") != "LORA":
        raise UnsupportedModelError(f"{fields.where}: peft_type {fields.raw('peft_type')!r}; supported is 'LORA'")
    for key in fields.keys():  # noqa: SIM118 - no mapping
        if key not in _KNOWN and fields.raw(key) not in _OFF:
            raise UnsupportedModelError(f"{fields.where}: {key} is set, which is not supported")
    for key, allowed in {"bias": (None, "none"), "init_lora_weights": _INITS}.items():
        if fields.raw(key) not in allowed:
            raise UnsupportedModelError(f"{fields.where}: {key} {fields.raw(key)!r} is not supported")
    if not (folder / PEFT_WEIGHTS).exists():
        raise CheckpointError(f"{folder}: {PEFT_WEIGHTS} is missing; other formats of the weights are not read")
    return _Format(
        weights=folder / PEFT_WEIGHTS,
        tensor=re.compile(r"base_model\.model\.model\.layers\.(\d{1,6})\.(\w+\.\w+)\.lora_([AB])\.weight", re.ASCII),
        modules={module: module for module in modules},
        scale=_peft_scale(fields),
        targets=_peft_targets(fields, modules),
    )


def _peft_targets(fields: Fields, modules: list[str]) -> frozenset[str] | None:
    """The modules that a list in target_modules is about; None for a text, which is a pattern that PEFT has applied."""
    targets = fields.raw("target_modules")
    if not isinstance(targets, list):
        return None
    known = {_last(module): module for module in modules}
    if wrong := next((target for target in targets if _last(str(target)) not in known), None):
        raise UnsupportedModelError(f"{fields.where}: target_modules has {wrong!r}; supported are {', '.join(known)}")
    return frozenset(known[_last(target)] for target in targets)


def _peft_scale(fields: Fields) -> Callable[[str, int], float]:
    """alpha / r, each from its pattern if one names the matrix. The rank in the file must be the configuration's."""
    default_rank, default_alpha = fields.size("r"), fields.number("lora_alpha")
    ranks, alphas = _pattern(fields, "rank_pattern"), _pattern(fields, "alpha_pattern")
    root = fields.flag("use_rslora", False)

    def scale(path: str, rank: int) -> float:
        expected = next((value for name, value in ranks.items() if _names(name, path)), default_rank)
        if rank != expected:
            raise CheckpointError(f"{fields.where}: {path} has rank {rank} in the file, but {expected:g} here")
        alpha = next((value for name, value in alphas.items() if _names(name, path)), default_alpha)
        return alpha / (math.sqrt(rank) if root else rank)

    return scale


def _pattern(fields: Fields, key: str) -> dict[str, float]:
    """Names of modules and numbers. PEFT takes the names for regular expressions; only plain ones are served."""
    child = fields.child(key)
    if child is None:
        return {}
    names = list(child.keys())
    if wrong := next((name for name in names if not re.fullmatch(r"\^?[\w.]+", name, re.ASCII)), None):
        raise UnsupportedModelError(f"{child.where}: {wrong!r} is a pattern; supported are names of modules")
    return {name: child.number(name) for name in names}


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _names(name: str, path: str) -> bool:
    """PEFT's `get_pattern_key` for plain names: the path or its end, whole parts; with ^ the path alone."""
    return path == name.removeprefix("^") or path.endswith("." + name)


def _mistral(folder: Path) -> _Format:
    fields = Fields.of_json(folder / MISTRAL_CONFIG)
    lora = fields.child("lora")
    if lora is None:
        raise CheckpointError(f"{fields.where}: lora is missing; it has the scale of the adapter")
    factor = lora.number("scaling", 2.0)  # the default of mistral-finetune and mistral-inference
    return _Format(
        weights=folder / MISTRAL_WEIGHTS,
        tensor=re.compile(r"layers\.(\d{1,6})\.(\w+\.\w+)\.lora_([AB])\.weight", re.ASCII),
        modules=_MISTRAL_NAMES,
        scale=lambda path, rank: factor,
        interleaved=True,
    )
