"""Who has the say over a setting: flag > NEMOSERVE_* > NIM_* alias > file > profile > default.

Each resolved value remembers where it came from, so that every message about it can say so.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.models.profiles import settings_of
from service.security.errors import SecurityError
from service.security.exposure import check_exposure
from service.settings.definitions import ALIAS_PREFIX, PREFIX, SETTINGS, Setting
from service.settings.parsing import AUTO

# Read where a setting cannot be: before there are settings, by whoever fetches models, and by tests.
OTHER_VARIABLES = (
    *("NEMOSERVE_CACHE", "NIM_CACHE_PATH", "NIM_DISABLE_MODEL_DOWNLOAD"),
    *("NEMOSERVE_API_KEY", "NEMOSERVE_TEST_DATA"),
)
_BY_NAME = {setting.name: setting for setting in SETTINGS}
FILE_BYTES = 2**20  # of a configuration file; one with every setting and a comment to each has a few thousand


class SettingError(Exception):
    """A value is wrong: the message names where it came from, the value and the limit."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A value and where it came from: a flag, a variable, "file PATH: key", "profile ID" or "default"."""

    value: Any
    source: str


Texts = Mapping[str, tuple[str, str]]
"""Of some settings, by name: source and text."""


def resolve(flags: Mapping[str, str | None], environ: Mapping[str, str]) -> dict[str, Resolved]:
    """Every setting by name.

    Args:
        flags: text of the flags that were given, by setting name.

    Raises:
        SettingError: a value is wrong, two do not go together, or the file cannot be read.
    """
    given = _given(flags, environ)
    settings = {setting.name: _resolve(setting, given) for setting in SETTINGS}
    _check_exposure(settings)
    _check_ports(settings["http_port"], settings["grpc_port"])
    _check_precisions(settings["dtype"], settings["precision"], settings["kv_precision"])
    _check_batch(settings["max_batch_size"], settings["max_batch_tokens"])
    _check_ranks(settings["tensor_parallel_size"], settings["lora_dir"])
    return settings


def resolve_model(flags: Mapping[str, str | None], environ: Mapping[str, str]) -> str:
    """The model alone, for who only wants its files: whatever else is wrong does not matter there.

    Raises:
        SettingError: it, the profile or the file is wrong.
    """
    return str(_resolve(_BY_NAME["model"], _given(flags, environ)).value)


def _given(flags: Mapping[str, str | None], environ: Mapping[str, str]) -> list[Texts]:
    """All that is said about settings, what has the say first."""
    given = [_of_flags(flags), _of_variables(environ)]
    if (path := _resolve(_BY_NAME["config"], given).value) is not None:
        given.append(read_file(Path(path)))
    profile = _resolve(_BY_NAME["profile"], given).value
    if profile not in (None, AUTO):
        given.append({name: (f"profile {profile}", text) for name, text in settings_of(profile).items()})
    return given


def _resolve(setting: Setting, given: Iterable[Texts]) -> Resolved:
    """The first of `given` that has it has the say."""
    for texts in given:
        if setting.name in texts:
            source, text = texts[setting.name]
            try:
                return Resolved(setting.parse(text), source)
            except ValueError as error:
                raise SettingError(f"{source}: {text!r} {error}") from None
    return Resolved(setting.default, "default")


def _of_flags(flags: Mapping[str, str | None]) -> Texts:
    return {name: (_BY_NAME[name].flag, text) for name, text in flags.items() if text is not None}


def _of_variables(environ: Mapping[str, str]) -> Texts:
    found = {}
    for setting in SETTINGS:
        for name in (setting.variable, setting.alias):
            if name is not None and name in environ:
                found[setting.name] = (name, environ[name])
                break
    return found


def read_file(path: Path) -> Texts:
    """A configuration file: YAML, one `setting: value` a line, named as flags are, with - or _.

    Raises:
        SettingError: it cannot be read, or says what is no setting.
    """
    import yaml

    class Loader(yaml.BaseLoader):
        """Every scalar is text, for the same parsers as flags: no 1:30 that is 90, no `off` that is False."""

    def mapping(loader: Loader, node: yaml.MappingNode) -> dict[str, Any]:
        pairs = [(str(loader.construct_object(key)), value) for key, value in node.value]
        for name, value in pairs:
            if not isinstance(value, yaml.ScalarNode):
                raise SettingError(f"file {path}: {name}: must be one value, not a list or a section")
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise SettingError(f"file {path}: {name}: stands there twice")
        return {name: value.value for name, value in pairs}

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    try:
        with path.open("rb") as opened:
            content = opened.read(FILE_BYTES + 1)
        if len(content) > FILE_BYTES:
            raise SettingError(f"file {path}: has more than {FILE_BYTES} bytes")
        read = yaml.load(content, Loader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SettingError(f"file {path}: not YAML{line}: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError):
        raise SettingError(f"file {path}: not YAML") from None
    except OSError as error:
        raise SettingError(f"file {path}: {error.strerror}") from None
    if read in (None, ""):
        return {}
    if not isinstance(read, dict):
        raise SettingError(f"file {path}: must be lines of `setting: value`")
    found: dict[str, tuple[str, str]] = {}
    for key, text in read.items():
        name = key.replace("-", "_")
        if name not in _BY_NAME or name == "config":
            near = difflib.get_close_matches(name, _BY_NAME, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise SettingError(f"file {path}: {key}: is no setting{hint}")
        if name in found:
            raise SettingError(f"file {path}: {key}: stands there twice")
        found[name] = (f"file {path}: {key}", text)
    return found


def _check_exposure(settings: Mapping[str, Resolved]) -> None:
    try:
        check_exposure({name: (each.value, each.source) for name, each in settings.items()})
    except SecurityError as error:
        raise SettingError(str(error)) from None


def _check_ports(http: Resolved, grpc: Resolved) -> None:
    if http.value == grpc.value != 0:
        named, other = (http, "gRPC") if http.source != "default" else (grpc, "HTTP")
        raise SettingError(f"{named.source}: {named.value} is the port of {other} too; one of the two must move")


def _check_precisions(dtype: Resolved, precision: Resolved, kv_precision: Resolved) -> None:
    """What is not quantised is in the compute dtype: bf16 by name cannot be fp32."""
    for setting, kept in ((precision, "weights"), (kv_precision, "keys and values")):
        if setting.value == "bf16" and dtype.value == "fp32":
            raise SettingError(
                f"{setting.source}: bf16 does not go with fp32 of {dtype.source}, in which {kept} that are not "
                f"quantised are kept; leave out one of the two"
            )


def _check_batch(size: Resolved, tokens: Resolved) -> None:
    if size.value is not None and tokens.value is not None and tokens.value < size.value:
        raise SettingError(
            f"{tokens.source}: {tokens.value} must be at least the {size.value} of max_batch_size: a token for each "
            "running request"
        )


def _check_ranks(ranks: Resolved, lora_dir: Resolved) -> None:
    if ranks.value > 1 and lora_dir.value:
        raise SettingError(
            f"{ranks.source}: {ranks.value} does not go with the adapters of {lora_dir.source}, which one device must "
            "serve alone; leave out one of the two"
        )


def unknown_variables(environ: Iterable[str]) -> dict[str, str | None]:
    """Variables with our prefixes that mean nothing here, likely misspelt, and the known one that is near to each."""
    known = {*OTHER_VARIABLES, *(setting.variable for setting in SETTINGS)}
    known |= {setting.alias for setting in SETTINGS if setting.alias}
    unknown = sorted(name for name in environ if name.startswith((PREFIX, ALIAS_PREFIX)) and name not in known)
    return {name: next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.8)), None) for name in unknown}
