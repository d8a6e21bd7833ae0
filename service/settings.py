"""Every setting of `nemoserve serve`, once: name, type, default and its reason; flags and help are made of it.

Precedence: flag > NEMOSERVE_* > NIM_* alias > profile > default. Each resolved value remembers where it came from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import EngineConfig
from engine.schemes import KV_PRECISIONS, SCHEMES
from service.models.profiles import settings_of
from service.security.errors import SecurityError
from service.security.exposure import check_exposure
from service.security.limits import MAX_REQUEST_BYTES

PREFIX, ALIAS_PREFIX = "NEMOSERVE_", "NIM_"
OTHER_VARIABLES = ("NEMOSERVE_CACHE", "NIM_CACHE_PATH", "NEMOSERVE_API_KEY", "NEMOSERVE_TEST_DATA")  # read elsewhere

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


class SettingError(Exception):
    """A value is wrong: the message names where it came from, the value and the limit."""


def _text(value: str) -> str:
    if not value:
        raise ValueError("must not be empty")
    return value


def _count(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            raise ValueError("must be a whole number") from None
        if not low <= number <= high:
            raise ValueError(f"must be between {low} and {high}")
        return number

    return parse


def _seconds(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ValueError("must be a number of seconds") from None
    if not 0 <= number <= 86400:
        raise ValueError("must be between 0 and 86400 seconds")
    return number


def _bytes(value: str) -> int:
    match = re.fullmatch(r"(\d{1,15})([KMG]i?)?B?", value)
    if match is None or int(match[1]) == 0:
        raise ValueError("must be a number of bytes, such as 800M or 4Gi")
    return int(match[1]) * _UNITS[match[2] or ""]


def _folder(value: str) -> str:
    path = Path(_text(value)).expanduser()
    if not path.is_dir():
        raise ValueError("must be a folder that is there")
    return str(path.absolute())


def _file(value: str) -> str:
    path = Path(_text(value)).expanduser()
    if not path.is_file():
        raise ValueError("must be a file that is there")
    return str(path.absolute())


def _choice(*choices: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return value

    return parse


def _profile(value: str) -> str:
    settings_of(value)
    return value


def _flag(value: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if value.lower() not in words:
        raise ValueError("must be true or false")
    return words[value.lower()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting. `default` None: the program works it out. `why` says how, or why the default is what it is.

    Attributes:
        metavar: what the value looks like, for the help.
    """

    name: str
    parse: Callable[[str], Any]
    default: Any
    why: str
    alias: str | None = None
    metavar: str = "N"

    @property
    def flag(self) -> str:
        """As it is given; the model is an argument."""
        return "MODEL" if self.name == "model" else "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    @property
    def is_switch(self) -> bool:
        """Its flag stands alone and turns it on; what is on by default takes a value."""
        return self.parse is _flag and not self.default


SETTINGS = (
    Setting(
        name="model",
        parse=_text,
        default="smollm2-135m-instruct",
        metavar="MODEL",
        why="a name of `nemoserve models`, hf://org/name[@revision], a folder, a .gguf file; the default runs anywhere",
        alias="NIM_MODEL_PATH",
    ),
    Setting(
        name="served_model_name",
        parse=_text,
        default=None,
        metavar="NAME",
        why="what clients call the model; by default the catalogue's or the file's name",
        alias="NIM_SERVED_MODEL_NAME",
    ),
    Setting(
        name="profile",
        parse=_profile,
        default=None,
        metavar="ID",
        why="an id of `nemoserve profiles`; decides model, device and precisions where nothing else does",
        alias="NIM_MODEL_PROFILE",
    ),
    Setting(
        name="host",
        parse=_text,
        default="127.0.0.1",
        metavar="ADDRESS",
        why="address to listen on; others than this machine's own need keys, client certificates or --allow-anonymous",
    ),
    Setting(
        name="grpc_port",
        parse=_count(0, 65535),
        default=8001,
        metavar="PORT",
        why="Triton's port, which its clients expect; 0 for any free one",
        alias="NIM_GRPC_API_PORT",
    ),
    Setting(
        name="allow_anonymous",
        parse=_flag,
        default=False,
        why="serve beyond loopback to whoever can reach the port; for networks that are closed themselves",
    ),
    Setting(
        name="api_keys_file",
        parse=_file,
        default=None,
        metavar="FILE",
        why="tenants and their keys, see `nemoserve keys --help`; with it everything but health checks needs a key",
    ),
    Setting(
        name="metrics_without_key",
        parse=_flag,
        default=False,
        why="metrics need no key, for scrapers that cannot send one; they tell of all tenants together",
    ),
    Setting(
        name="tls_mode",
        parse=lambda value: _choice("auto", "disabled", "tls", "mtls")(value.lower()),
        default="auto",
        metavar="auto|disabled|tls|mtls",
        why="auto: as the files that are given say",
        alias="NIM_SSL_MODE",
    ),
    Setting(
        name="tls_cert",
        parse=_file,
        default=None,
        metavar="FILE",
        why="certificate chain of both ports, PEM; by default they are in plain text; renewed files are taken at once",
        alias="NIM_SSL_CERTS_PATH",
    ),
    Setting(
        name="tls_key",
        parse=_file,
        default=None,
        metavar="FILE",
        why="private key of the certificate, PEM",
        alias="NIM_SSL_KEY_PATH",
    ),
    Setting(
        name="tls_client_ca",
        parse=_file,
        default=None,
        metavar="FILE",
        why="CA whose certificates clients must show (mTLS), PEM; who has no key is then the tenant named there",
        alias="NIM_SSL_CA_CERTS_PATH",
    ),
    Setting(
        name="max_request_bytes",
        parse=_bytes,
        default=MAX_REQUEST_BYTES,
        metavar="BYTES",
        why="larger requests are refused unread; 16 MiB are 128 bytes for each token of the longest context",
    ),
    Setting(
        name="precision",
        parse=_choice(*SCHEMES),
        default="auto",
        metavar="|".join(SCHEMES),
        why="how weights are kept: as the file stores them (auto), bf16, fp8 (activations too), fp8-weight-only, int8, "
        "int4; `nemoserve doctor` tells which fit",
    ),
    Setting(
        name="kv_precision",
        parse=_choice(*KV_PRECISIONS),
        default="auto",
        metavar="|".join(KV_PRECISIONS),
        why="how keys and values are kept: in the compute dtype (auto), bf16, or fp8, which holds twice the tokens",
    ),
    Setting(
        name="dtype",
        parse=_choice("auto", "bf16", "fp32"),
        default="auto",
        metavar="auto|bf16|fp32",
        why="what is computed in; auto: bf16 where the CPU or GPU multiplies it",
    ),
    Setting(
        name="device",
        parse=_choice("auto", "cpu", "cuda"),
        default="auto",
        metavar="auto|cpu|cuda",
        why="auto: a GPU if there is one",
    ),
    Setting(
        name="max_model_len",
        parse=_count(2),
        default=None,
        why="longest prompt and completion in tokens; by default what the model, 131072 and the KV cache allow",
        alias="NIM_MAX_MODEL_LEN",
    ),
    Setting(
        name="max_batch_size",
        parse=_count(1, 4096),
        default=32,
        why="requests that run at once; more gain nothing on a CPU",
    ),
    Setting(
        name="max_batch_tokens",
        parse=_count(1),
        default=512,
        why="tokens of one step; bounds how long a long prompt can hold up the other streams",
    ),
    Setting(
        name="max_draft_tokens",
        parse=_count(0, 64),
        default=7,
        why="tokens guessed from earlier text and checked in one step, where that pays; 0: none; tokens are the same",
    ),
    Setting(
        name="kv_memory",
        parse=_bytes,
        default=None,
        metavar="BYTES",
        why="bytes of KV cache (800M, 4Gi); by default 2,048 tokens per request, at most half of the free memory",
    ),
    Setting(
        name="prefix_caching",
        parse=_flag,
        default=True,
        metavar="true|false",
        why="what requests begin with alike is computed once, also for those that come later; the tokens are the same",
        alias="NIM_ENABLE_KV_CACHE_REUSE",
    ),
    Setting(name="threads", parse=_count(1, 1024), default=None, why="CPU threads of the engine; by default all cores"),
    Setting(
        name="tensor_parallel_size",
        parse=_count(1, 64),
        default=1,
        why="GPUs that share the model, a process each: for a model that one cannot hold, or to have answers sooner",
        alias="NIM_TENSOR_PARALLEL_SIZE",
    ),
    Setting(
        name="lookahead",
        parse=_count(0, 1),
        default=None,
        metavar="0|1",
        why="steps that begin before the tokens of the last one are known, for the same tokens; by default 1 on a GPU, "
        "which so never waits, and 0 on a CPU, which is both who waits and who is waited for",
    ),
    Setting(
        name="cuda_graphs",
        parse=_flag,
        default=True,
        metavar="true|false",
        why="on one GPU, decode steps are recorded at the start and replayed, so that they do not wait for the host",
    ),
    Setting(
        name="lora_dir",
        parse=_folder,
        default=None,
        metavar="FOLDER",
        why="LoRA adapters, a subfolder each, which is the name that clients ask for; by default there are none",
        alias="NIM_PEFT_SOURCE",
    ),
    Setting(
        name="lora_refresh",
        parse=_seconds,
        default=0.0,
        metavar="SECONDS",
        why="how often to look for adapters that were added, changed or removed; 0: only at the start",
        alias="NIM_PEFT_REFRESH_INTERVAL",
    ),
    Setting(
        name="max_loras",
        parse=_count(1, 4096),
        default=8,
        why="adapters whose requests run at once; each takes memory of the device, 218 MiB of a GPU for Mistral NeMo",
        alias="NIM_MAX_GPU_LORAS",
    ),
    Setting(
        name="max_cpu_loras",
        parse=_count(1, 65536),
        default=64,
        why="adapters that can be loaded; all of them stay in the host's memory",
        alias="NIM_MAX_CPU_LORAS",
    ),
    Setting(
        name="max_lora_rank",
        parse=_count(1, 4096),
        default=32,
        why="highest rank of an adapter; few have more, and device memory is taken for it",
        alias="NIM_MAX_LORA_RANK",
    ),
    Setting(
        name="drain_timeout",
        parse=_seconds,
        default=30.0,
        metavar="SECONDS",
        why="seconds that accepted requests have to end after SIGTERM; Kubernetes' own default grace",
    ),
    Setting(
        name="log_level",
        parse=lambda value: _choice("debug", "info", "warning", "error")(value.lower()),
        default="info",
        metavar="debug|info|warning|error",
        why="the least important lines to print",
        alias="NIM_LOG_LEVEL",
    ),
    Setting(
        name="log_json",
        parse=_flag,
        default=False,
        why="one JSON object per line and no greeting, for log collectors; people read the other form",
        alias="NIM_JSONL_LOGGING",
    ),
)


@dataclass(frozen=True, slots=True)
class Resolved:
    """A value and where it came from: a flag, a variable, "profile ID" or "default"."""

    value: Any
    source: str


def resolve(flags: Mapping[str, str | None], environ: Mapping[str, str]) -> dict[str, Resolved]:
    """Every setting by name.

    Args:
        flags: text of the flags that were given, by setting name.

    Raises:
        SettingError: a value is wrong, or two do not go together.
    """
    [profile] = (_resolve(setting, flags, environ, {}) for setting in SETTINGS if setting.name == "profile")
    named = {} if profile.value is None else settings_of(profile.value)
    by_profile = {name: (f"profile {profile.value}", text) for name, text in named.items()}
    settings = {setting.name: _resolve(setting, flags, environ, by_profile) for setting in SETTINGS}
    _check_exposure(settings)
    _check_precisions(settings["dtype"], settings["precision"], settings["kv_precision"])
    _check_batch(settings["max_batch_size"], settings["max_batch_tokens"])
    _check_ranks(settings["tensor_parallel_size"], settings["lora_dir"])
    return settings


def _check_exposure(settings: Mapping[str, Resolved]) -> None:
    try:
        check_exposure({name: (each.value, each.source) for name, each in settings.items()})
    except SecurityError as error:
        raise SettingError(str(error)) from None


def _check_precisions(dtype: Resolved, precision: Resolved, kv_precision: Resolved) -> None:
    """What is not quantised is in the compute dtype: bf16 by name cannot be fp32."""
    for setting, kept in ((precision, "weights"), (kv_precision, "keys and values")):
        if setting.value == "bf16" and dtype.value == "fp32":
            raise SettingError(
                f"{setting.source}: bf16 does not go with fp32 of {dtype.source}, in which {kept} that are not "
                f"quantised are kept; leave out one of the two"
            )


def _check_batch(size: Resolved, tokens: Resolved) -> None:
    if tokens.value < size.value:
        named, rule = tokens, f"at least the {size.value} of max_batch_size"
        if tokens.source == "default":
            named, rule = size, f"at most the {tokens.value} of max_batch_tokens"
        raise SettingError(f"{named.source}: {named.value} must be {rule}: a token for each running request")


def _check_ranks(ranks: Resolved, lora_dir: Resolved) -> None:
    if ranks.value > 1 and lora_dir.value:
        raise SettingError(
            f"{ranks.source}: {ranks.value} does not go with the adapters of {lora_dir.source}, which one device must "
            "serve alone; leave out one of the two"
        )


def engine_config(model: Path, values: Mapping[str, Any]) -> EngineConfig:
    """What the resolved values say to the engine."""
    dtypes = {"auto": "auto", "bf16": "bfloat16", "fp32": "float32"}
    return EngineConfig(
        model_path=str(model),
        dtype=dtypes[values["dtype"]],
        precision=values["precision"],
        kv_precision=values["kv_precision"],
        device=values["device"],
        max_model_len=values["max_model_len"],
        max_batch_size=values["max_batch_size"],
        max_batch_tokens=values["max_batch_tokens"],
        max_draft_tokens=values["max_draft_tokens"],
        kv_memory_bytes=values["kv_memory"],
        prefix_caching=values["prefix_caching"],
        threads=values["threads"],
        tensor_parallel_size=values["tensor_parallel_size"],
        lookahead=values["lookahead"],
        cuda_graphs=values["cuda_graphs"],
        max_loras=values["max_loras"] if values["lora_dir"] else 0,
        max_cpu_loras=values["max_cpu_loras"],
        max_lora_rank=values["max_lora_rank"],
    )


def join_address(host: str, port: int) -> str:
    """HOST:PORT as gRPC takes it, IPv6 addresses in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _resolve(
    setting: Setting,
    flags: Mapping[str, str | None],
    environ: Mapping[str, str],
    by_profile: Mapping[str, tuple[str, str]],
) -> Resolved:
    """`by_profile`: name -> its source and text."""
    sources = (
        (setting.flag, flags.get(setting.name)),
        (setting.variable, environ.get(setting.variable)),
        (setting.alias or "", environ.get(setting.alias or "")),
        by_profile.get(setting.name, ("", None)),
    )
    for source, text in sources:
        if text is not None:
            try:
                return Resolved(setting.parse(text), source)
            except ValueError as error:
                raise SettingError(f"{source}: {text!r} {error}") from None
    return Resolved(setting.default, "default")


def unknown_variables(environ: Iterable[str]) -> list[str]:
    """Variables with our prefixes that mean nothing here, likely misspelt."""
    known = {*OTHER_VARIABLES, *(setting.variable for setting in SETTINGS), *(setting.alias for setting in SETTINGS)}
    return sorted(name for name in environ if name.startswith((PREFIX, ALIAS_PREFIX)) and name not in known)
