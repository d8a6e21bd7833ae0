"""Every setting of `nemoserve serve`, once: name, type, default and its reason; flags and help are made of it.

`service.settings.resolve` decides which of flag, variable, file, profile and default has the say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import EngineConfig
from engine.schemes import KV_PRECISIONS, SCHEMES
from service.admission.limits import QueueLimits
from service.security.limits import MAX_REQUEST_BYTES
from service.settings import parsing

PREFIX, ALIAS_PREFIX = "NEMOSERVE_", "NIM_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting. `default` None: the program works it out. `why` says how, or why the default is what it is.

    Attributes:
        parse: of `service.settings.parsing`.
        alias: NIM's or OpenTelemetry's variable that means the same.
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
    def shown_default(self) -> str:
        """The default as it would be given; empty where the program works it out."""
        match self.default:
            case None:
                return ""
            case bool():
                return str(self.default).lower()
            case float():
                return f"{self.default:g}"
            case _:
                return str(self.default)

    @property
    def is_switch(self) -> bool:
        """Its flag stands alone and turns it on; what is on by default takes a value."""
        return self.parse is parsing.flag and not self.default


SETTINGS = (
    Setting(
        name="model",
        parse=parsing.text,
        default="smollm2-135m-instruct",
        metavar="MODEL",
        why="a name of `nemoserve models`, hf://org/name[@revision], a folder, a .gguf file; the default runs anywhere",
        alias="NIM_MODEL_PATH",
    ),
    Setting(
        name="served_model_name",
        parse=parsing.names,
        default=None,
        metavar="NAME",
        why="what clients call the model, or several names, NAME,NAME; by default the catalogue's or the file's name",
        alias="NIM_SERVED_MODEL_NAME",
    ),
    Setting(
        name="profile",
        parse=parsing.profile,
        default=None,
        metavar="ID|auto",
        why="an id of `nemoserve profiles`, which decides model, device and precisions where nothing else does; auto: "
        "the first that fits here, the file's own precision before fp8, int8, int4",
        alias="NIM_MODEL_PROFILE",
    ),
    Setting(
        name="config",
        parse=parsing.file,
        default=None,
        metavar="FILE",
        why="YAML with any of these settings, such as `max_model_len: 8192`; flags and variables go before it",
    ),
    Setting(
        name="host",
        parse=parsing.text,
        default="127.0.0.1",
        metavar="ADDRESS",
        why="address to listen on, 0.0.0.0 for all, IPv6 too; others than this machine's own need keys, client "
        "certificates or --allow-anonymous",
    ),
    Setting(
        name="http_port",
        parse=parsing.port_or_off,
        default=8000,
        metavar="PORT|off",
        why="where OpenAI's clients and Kubernetes' habits look for it; 0 for any free one; off: gRPC alone",
        alias="NIM_SERVER_PORT",
    ),
    Setting(
        name="grpc_port",
        parse=parsing.count(0, 65535),
        default=8001,
        metavar="PORT",
        why="Triton's port, which its clients expect; 0 for any free one",
        alias="NIM_GRPC_API_PORT",
    ),
    Setting(
        name="allow_anonymous",
        parse=parsing.flag,
        default=False,
        why="serve beyond loopback to whoever can reach the port; for networks that are closed themselves",
    ),
    Setting(
        name="api_keys_file",
        parse=parsing.file,
        default=None,
        metavar="FILE",
        why="tenants and their keys, see `nemoserve keys --help`; with it everything but health checks needs a key",
    ),
    Setting(
        name="metrics_without_key",
        parse=parsing.flag,
        default=False,
        why="metrics need no key, for scrapers that cannot send one; they tell of all tenants together",
    ),
    Setting(
        name="tls_mode",
        parse=lambda value: parsing.choice("auto", "disabled", "tls", "mtls")(value.lower()),
        default="auto",
        metavar="auto|disabled|tls|mtls",
        why="auto: as the files that are given say",
        alias="NIM_SSL_MODE",
    ),
    Setting(
        name="tls_cert",
        parse=parsing.file,
        default=None,
        metavar="FILE",
        why="certificate chain of both ports, PEM; by default they are in plain text; renewed files are taken at once",
        alias="NIM_SSL_CERTS_PATH",
    ),
    Setting(
        name="tls_key",
        parse=parsing.file,
        default=None,
        metavar="FILE",
        why="private key of the certificate, PEM",
        alias="NIM_SSL_KEY_PATH",
    ),
    Setting(
        name="tls_client_ca",
        parse=parsing.file,
        default=None,
        metavar="FILE",
        why="CA whose certificates clients must show (mTLS), PEM; who has no key is then the tenant named there",
        alias="NIM_SSL_CA_CERTS_PATH",
    ),
    Setting(
        name="max_request_bytes",
        parse=parsing.size,
        default=MAX_REQUEST_BYTES,
        metavar="BYTES",
        why="larger requests are refused unread; 16 MiB are 128 bytes for each token of the longest context",
    ),
    Setting(
        name="precision",
        parse=parsing.choice(*SCHEMES),
        default="auto",
        metavar="|".join(SCHEMES),
        why="how weights are kept: as the file stores them (auto), bf16, fp8 (activations too), fp8-weight-only, int8, "
        "int4; `nemoserve doctor` tells which fit",
    ),
    Setting(
        name="kv_precision",
        parse=parsing.choice(*KV_PRECISIONS),
        default="auto",
        metavar="|".join(KV_PRECISIONS),
        why="how keys and values are kept: in the compute dtype (auto), bf16, or fp8, which holds twice the tokens",
    ),
    Setting(
        name="dtype",
        parse=parsing.choice("auto", "bf16", "fp32"),
        default="auto",
        metavar="auto|bf16|fp32",
        why="what is computed in; auto: bf16 where the CPU or GPU multiplies it",
    ),
    Setting(
        name="device",
        parse=parsing.choice("auto", "cpu", "cuda"),
        default="auto",
        metavar="auto|cpu|cuda",
        why="auto: a GPU if there is one",
    ),
    Setting(
        name="max_model_len",
        parse=parsing.count(2),
        default=None,
        why="longest prompt and completion in tokens; by default what the model, 131072 and the KV cache allow",
        alias="NIM_MAX_MODEL_LEN",
    ),
    Setting(
        name="max_batch_size",
        parse=parsing.count(1, 4096),
        default=None,
        why="requests that run at once; by default 256 on a GPU and 32 on a CPU, where more gain nothing",
    ),
    Setting(
        name="max_batch_tokens",
        parse=parsing.count(1),
        default=None,
        why="tokens of one step, which is how long a prompt can hold up the other streams; by default 2,048 on a GPU "
        "and 512 on a CPU",
    ),
    Setting(
        name="max_draft_tokens",
        parse=parsing.count(0, 64),
        default=7,
        why="tokens guessed from earlier text and checked in one step, where that pays; 0: none; tokens are the same",
    ),
    Setting(
        name="kv_memory",
        parse=parsing.memory,
        default=None,
        metavar="BYTES|SHARE",
        why="KV cache in bytes (800M, 4Gi) or as a share of what weights and workspace leave (0.9, 90%); by default "
        "all of it on a GPU, and on a CPU 2,048 tokens per request, at most half",
        alias="NIM_KVCACHE_PERCENT",
    ),
    Setting(
        name="prefix_caching",
        parse=parsing.flag,
        default=True,
        metavar="true|false",
        why="what requests begin with alike is computed once, also for those that come later; the tokens are the same",
        alias="NIM_ENABLE_KV_CACHE_REUSE",
    ),
    Setting(
        name="threads",
        parse=parsing.count(1, 1024),
        default=None,
        why="CPU threads of the engine; by default all cores",
    ),
    Setting(
        name="tensor_parallel_size",
        parse=parsing.count(1, 64),
        default=1,
        why="GPUs that share the model, a process each: for a model that one cannot hold, or to have answers sooner",
        alias="NIM_TENSOR_PARALLEL_SIZE",
    ),
    Setting(
        name="lookahead",
        parse=parsing.count(0, 1),
        default=None,
        metavar="0|1",
        why="steps that begin before the tokens of the last one are known, for the same tokens; by default 1 on a GPU, "
        "which so never waits, and 0 on a CPU, which is both who waits and who is waited for",
    ),
    Setting(
        name="cuda_graphs",
        parse=parsing.flag,
        default=True,
        metavar="true|false",
        why="on one GPU, decode steps are recorded at the start and replayed, so that they do not wait for the host",
    ),
    Setting(
        name="lora_dir",
        parse=parsing.folder,
        default=None,
        metavar="FOLDER",
        why="LoRA adapters, a subfolder each, which is the name that clients ask for; by default there are none",
        alias="NIM_PEFT_SOURCE",
    ),
    Setting(
        name="lora_refresh",
        parse=parsing.seconds,
        default=0.0,
        metavar="SECONDS",
        why="how often to look for adapters that were added, changed or removed; 0: only at the start",
        alias="NIM_PEFT_REFRESH_INTERVAL",
    ),
    Setting(
        name="max_loras",
        parse=parsing.count(1, 4096),
        default=8,
        why="adapters whose requests run at once; each takes memory of the device, 218 MiB of a GPU for Mistral NeMo",
        alias="NIM_MAX_GPU_LORAS",
    ),
    Setting(
        name="max_cpu_loras",
        parse=parsing.count(1, 65536),
        default=64,
        why="adapters that can be loaded; all of them stay in the host's memory",
        alias="NIM_MAX_CPU_LORAS",
    ),
    Setting(
        name="max_lora_rank",
        parse=parsing.count(1, 4096),
        default=32,
        why="highest rank of an adapter; few have more, and device memory is taken for it",
        alias="NIM_MAX_LORA_RANK",
    ),
    Setting(
        name="max_queue_size",
        parse=parsing.count(0),
        default=None,
        why="requests that may wait; by default 8 for each of --max-batch-size: who would wait longer is better told "
        "to come back, or served by another replica",
    ),
    Setting(
        name="max_queue_tokens",
        parse=parsing.count(1),
        default=None,
        why="tokens of their prompts; by default 2,048 for each of --max-queue-size, and at least one whole context",
    ),
    Setting(
        name="slow_reader_timeout",
        parse=parsing.patience,
        default=30.0,
        metavar="SECONDS",
        why="a request is ended whose client reads nothing for so long; a phone that changes its network is back by "
        "then",
    ),
    Setting(
        name="lame_duck",
        parse=parsing.seconds,
        default=None,
        metavar="SECONDS",
        why="after SIGTERM, how long new requests are still taken while the server says that it is not ready; by "
        "default 5, which Kubernetes needs to tell all who send them, and 0 on loopback, where nobody has to be told",
    ),
    Setting(
        name="drain_timeout",
        parse=parsing.seconds,
        default=25.0,
        metavar="SECONDS",
        why="after SIGTERM, how long accepted requests have to end, --lame-duck included; five seconds less than "
        "Kubernetes waits by default before it kills",
    ),
    Setting(
        name="max_connection_age",
        parse=parsing.seconds,
        default=None,
        metavar="SECONDS",
        why="when a connection is as old as that, give or take a tenth, its client is told to make a new one, once "
        "what runs has ended: so clients find replicas that have come, and leave one that is to go. By default 60, and "
        "0, never, on loopback, where there is one server",
    ),
    Setting(
        name="engine_restarts",
        parse=parsing.count(0, 1000),
        default=3,
        why="how often in ten minutes an engine that died or hangs is started again before the server ends with 70; "
        "one that needs more fails for a reason that a restart does not mend",
    ),
    Setting(
        name="engine_timeout",
        parse=parsing.seconds,
        default=None,
        metavar="SECONDS",
        why="how long a step may take before the engine counts as hung; by default 60 on a GPU, where kernels may "
        "still have to be compiled, and 300 on a CPU, whose step of a long prompt of a 12B model takes minutes",
    ),
    Setting(
        name="model_control",
        parse=parsing.choice("none", "explicit"),
        default="none",
        metavar="none|explicit",
        why="explicit: administrators may load and unload the model through Triton's repository API; none: nobody may",
    ),
    Setting(
        name="log_level",
        parse=parsing.level,
        default="info",
        metavar="debug|info|warning|error",
        why="the least important lines to print",
        alias="NIM_LOG_LEVEL",
    ),
    Setting(
        name="log_json",
        parse=parsing.flag,
        default=False,
        why="one JSON object per line and no greeting, for log collectors; people read the other form",
        alias="NIM_JSONL_LOGGING",
    ),
    Setting(
        name="metrics_aliases",
        parse=parsing.flag,
        default=True,
        metavar="true|false",
        why="metrics also under the names of vLLM and NIM, which gateways, autoscalers and dashboards look for",
    ),
    Setting(
        name="otlp_endpoint",
        parse=parsing.url,
        default=None,
        metavar="URL",
        why="OpenTelemetry collector that gets traces over gRPC: http://HOST:4317, or https; by default there are none",
        alias="OTEL_EXPORTER_OTLP_ENDPOINT",
    ),
    Setting(
        name="trace_content",
        parse=parsing.flag,
        default=False,
        why="put prompts and answers into traces; whoever sees those can then read them",
    ),
)

SECTIONS = {
    "Model": ("model", "served_model_name", "profile", "config"),
    "Ports": ("host", "http_port", "grpc_port"),
    "Security": (
        *("allow_anonymous", "api_keys_file", "metrics_without_key"),
        *("tls_mode", "tls_cert", "tls_key", "tls_client_ca", "max_request_bytes"),
    ),
    "Engine": (
        *("precision", "kv_precision", "dtype", "device", "max_model_len", "max_batch_size", "max_batch_tokens"),
        *("max_draft_tokens", "kv_memory", "prefix_caching", "threads", "tensor_parallel_size", "lookahead"),
        "cuda_graphs",
    ),
    "LoRA adapters": ("lora_dir", "lora_refresh", "max_loras", "max_cpu_loras", "max_lora_rank"),
    "Queue": ("max_queue_size", "max_queue_tokens", "slow_reader_timeout"),
    "Life": ("lame_duck", "drain_timeout", "max_connection_age", "engine_restarts", "engine_timeout", "model_control"),
    "Observability": ("log_level", "log_json", "metrics_aliases", "otlp_endpoint", "trace_content"),
}
"""The headings that help and documentation have settings under."""


def queue_limits(values: Mapping[str, Any]) -> QueueLimits:
    """What the resolved values say to admission."""
    return QueueLimits(
        max_requests=values["max_queue_size"],
        max_tokens=values["max_queue_tokens"],
        slow_reader_seconds=values["slow_reader_timeout"],
    )


def engine_config(model: Path, values: Mapping[str, Any]) -> EngineConfig:
    """What the resolved values say to the engine."""
    dtypes = {"auto": "auto", "bf16": "bfloat16", "fp32": "float32"}
    kv_memory = values["kv_memory"]
    is_share = isinstance(kv_memory, float)
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
        kv_memory_bytes=None if is_share else kv_memory,
        kv_memory_share=kv_memory if is_share else None,
        prefix_caching=values["prefix_caching"],
        threads=values["threads"],
        tensor_parallel_size=values["tensor_parallel_size"],
        lookahead=values["lookahead"],
        cuda_graphs=values["cuda_graphs"],
        max_loras=values["max_loras"] if values["lora_dir"] else 0,
        max_cpu_loras=values["max_cpu_loras"],
        max_lora_rank=values["max_lora_rank"],
        log_level=values["log_level"],
        log_json=values["log_json"],
    )


def join_address(host: str, port: int) -> str:
    """HOST:PORT as gRPC takes it, IPv6 addresses in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
