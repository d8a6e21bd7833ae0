"""What a configuration says of its FP8 weights: four dialects, one kind of answer.

    fp8                 quantization_config of AutoFP8 and transformers: a scale per tensor, or per block of it
    compressed-tensors  config_groups with targets: a scale per tensor, per channel (output), or per block
    modelopt            NVIDIA's, in hf_quant_config.json or in config.json: a scale per tensor, or per channel
    qformat_weight      Mistral's own, `quantization` of params.json: a scale per tensor, or per channel

Inputs are quantised with a scale from the file (static), or with one per token as they come (dynamic). Where a
publisher scales inputs per 128 of them, or not at all, ours are scaled per token if they are quantised at all.

Sources: vLLM `model_executor/layers/quantization/{fp8,modelopt}.py`, `compressed_tensors/`, and
`transformers_utils/configs/mistral.py`; NVIDIA Model-Optimizer `modelopt/torch/export/convert_hf_config.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path

from engine.checkpoint.fields import Fields
from engine.errors import UnsupportedModelError

MODELOPT = "hf_quant_config.json"
_BLOCK_INPUTS = 128  # kernels take whole multiples; every publisher's block is 128 x 128
_REPEATS, _ALTERNATIVES = 3, 8  # at most in a pattern from a file: a name is then matched in well under a second
_KV_SCHEMES = (None, "FP8")


class Per(Enum):
    """What shares a scale."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    BLOCK = "block"
    TENSOR_OR_CHANNEL = "tensor or channel"


@dataclass(frozen=True, slots=True)
class Fp8Scheme:
    """How matrices are coded.

    Attributes:
        per: what shares a scale of weights.
        block: outputs and inputs of a block, for `Per.BLOCK`.
        static: there is a scale for inputs in the file.
    """

    per: Per
    static: bool
    block: tuple[int, int] = (1, 1)


@dataclass(frozen=True, slots=True)
class Fp8Claims:
    """What a configuration says.

    Attributes:
        where: the file, and the key in it.
        scheme_of: from all names of a module to how it is coded; None = it is not.
    """

    where: str
    scheme_of: Callable[[Sequence[str]], Fp8Scheme | None]


def hf_claims(fields: Fields, folder: Path) -> Fp8Claims | None:
    """Those of config.json and of what ModelOpt puts beside it; None if the weights are floats.

    Raises:
        CheckpointError, UnsupportedModelError: the quantisation is another, or not described as it should be.
    """
    found = fields.child("quantization_config") or fields.child("compression_config")
    if found is None:
        if not (folder / MODELOPT).exists():
            return None
        found = Fields.of_json(folder / MODELOPT)
        return _modelopt(found.child("quantization") or found)
    match found.raw("quant_method"):
        case "fp8":
            return _fp8(found)
        case "compressed-tensors":
            return _compressed_tensors(found)
        case "modelopt":
            return _modelopt(found.child("quantization") or found)
        case other:
            raise _unsupported(found, "quant_method", other, "fp8, compressed-tensors and modelopt")


def mistral_claims(fields: Fields) -> Fp8Claims | None:
    """Those of params.json. Raises as `hf_claims` does."""
    found = fields.child("quantization")
    if found is None:
        return None
    _require(found, "qformat_weight", "fp8_e4m3")
    _require(found, "qscheme_act", None, "TENSOR", "NO_SCALES")
    scheme = Fp8Scheme(Per.TENSOR_OR_CHANNEL, static=found.raw("qscheme_act") != "NO_SCALES")
    return Fp8Claims(found.where, lambda names: scheme if _is_linear(names) else None)


def _fp8(fields: Fields) -> Fp8Claims:
    _require(fields, "activation_scheme", "static", "dynamic")
    _require(fields, "fmt", None, "e4m3")
    static = fields.raw("activation_scheme") == "static"
    block = fields.raw("weight_block_size")
    scheme = Fp8Scheme(Per.TENSOR, static) if block is None else _blocks(fields, "weight_block_size", static)
    ignored = [*_patterns(fields, "ignored_layers"), *_patterns(fields, "modules_to_not_convert")]
    return Fp8Claims(fields.where, _but(scheme, ignored))


def _compressed_tensors(fields: Fields) -> Fp8Claims:
    _require(fields, "format", "float-quantized", "naive-quantized")
    for key in ("sparsity_config", "transform_config"):
        child = fields.child(key)
        if child and any(child.raw(name) not in (None, {}, "dense") for name in ("format", "config_groups")):
            raise _unsupported(fields, key, "set", "none")
    _check_kv(fields)
    groups = fields.child("config_groups")
    if groups is None:
        raise fields.wrong("config_groups", None, "an object")
    schemes = []
    for name in groups.keys():  # noqa: SIM118 - no mapping
        group = groups.child(name)
        if group is not None and group.raw("weights") is not None:
            schemes.append((_patterns(group, "targets"), _group_scheme(group)))
    ignored = _patterns(fields, "ignore")

    def scheme_of(names: Sequence[str]) -> Fp8Scheme | None:
        if _any(ignored, names):
            return None
        for targets, scheme in schemes:
            if ("Linear" in targets and _is_linear(names)) or _any(targets, names):
                return scheme
        return None

    return Fp8Claims(fields.where, scheme_of)


def _group_scheme(group: Fields) -> Fp8Scheme:
    """One of config_groups: 8-bit floats, symmetric."""
    _require(group, "format", None, "float-quantized", "naive-quantized")
    weights, inputs = group.child("weights"), group.child("input_activations")
    assert weights is not None
    _require(weights, "strategy", "tensor", "channel", "block")
    _require(weights, "dynamic", None, False)
    for each in (weights, inputs):
        if each is not None:
            _require(each, "num_bits", 8)
            _require(each, "type", "float")
            _require(each, "symmetric", None, True)
    static = inputs is not None and not inputs.flag("dynamic", False)
    if static and inputs is not None:
        _require(inputs, "strategy", None, "tensor")
    if weights.raw("strategy") == "block":
        return _blocks(weights, "block_structure", static)
    return Fp8Scheme(Per(weights.raw("strategy")), static)


def _modelopt(fields: Fields) -> Fp8Claims:
    _require(fields, "quant_algo", "FP8", "FP8_PER_CHANNEL_PER_TOKEN")
    _require(fields, "kv_cache_quant_algo", *_KV_SCHEMES)
    _check_kv(fields)
    if fields.raw("quant_algo") == "FP8":
        scheme = Fp8Scheme(Per.TENSOR, static=True)
    else:
        scheme = Fp8Scheme(Per.CHANNEL, static=False)
    return Fp8Claims(fields.where, _but(scheme, [*_patterns(fields, "exclude_modules"), *_patterns(fields, "ignore")]))


def _check_kv(fields: Fields) -> None:
    """A KV cache in FP8 may be asked for. Ours finds its own scales, so those of the file are not needed."""
    scheme = fields.raw("kv_cache_scheme")
    if not isinstance(scheme, dict):
        _require(fields, "kv_cache_scheme", *_KV_SCHEMES)
    elif child := fields.child("kv_cache_scheme"):
        _require(child, "num_bits", 8)
        _require(child, "type", "float")


def _blocks(fields: Fields, key: str, static: bool) -> Fp8Scheme:
    match fields.raw(key):
        case [int(outputs), int(inputs)] if outputs > 0 and inputs > 0 and inputs % _BLOCK_INPUTS == 0:
            return Fp8Scheme(Per.BLOCK, static, (outputs, inputs))
        case other:
            raise fields.wrong(key, other, f"[outputs, inputs], inputs a multiple of {_BLOCK_INPUTS}")


def _but(scheme: Fp8Scheme, ignored: list[str]) -> Callable[[Sequence[str]], Fp8Scheme | None]:
    """All linear maps but those."""
    return lambda names: scheme if _is_linear(names) and not _any(ignored, names) else None


def _is_linear(names: Iterable[str]) -> bool:
    return all(not name.endswith(("embed_tokens", "tok_embeddings")) for name in names)


def _patterns(fields: Fields, key: str) -> list[str]:
    """Names of modules, with `re:` regular expressions. Those of a file must not take for ever to match."""
    values = fields.raw(key) or []
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise fields.wrong(key, values, "a list of names")
    for value in values:
        if value.startswith("re:"):
            expression = value.removeprefix("re:")
            many = len(re.findall(r"[*+?{]", expression)) > _REPEATS or expression.count("|") > _ALTERNATIVES
            if many or re.search(r"\)[*+?{]", expression):
                limits = f"at most {_REPEATS} repetitions, none of a group, and {_ALTERNATIVES} alternatives"
                raise fields.wrong(key, value, f"a pattern with {limits}")
            try:
                re.compile(expression)
            except (re.error, RecursionError, OverflowError) as error:
                raise fields.wrong(key, value, f"a regular expression ({error})") from None
    return values


def _any(patterns: Iterable[str], names: Iterable[str]) -> bool:
    return any(_matches(pattern, name) for pattern in patterns for name in names)


def _matches(pattern: str, name: str) -> bool:
    """Regular expressions match from the start, wildcards the whole, and plain names some whole parts of a path."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    if "*" in pattern:
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def _require(fields: Fields, key: str, *allowed: object) -> None:
    value = fields.raw(key)
    if not any(value == each and type(value) is type(each) for each in allowed):
        raise _unsupported(fields, key, value, " and ".join("none" if each is None else str(each) for each in allowed))


def _unsupported(fields: Fields, key: str, value: object, supported: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{fields.where}: {key} {value!r:.60} is not supported; supported: {supported}")
