"""`nemoserve`: the command line. Exit codes: 0 done, 1 failed, 2 wrong usage, 70 the engine was lost while serving.

Imports are made where they are needed: `--help` must not wait for gRPC.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.key_commands import keys
from service.models.catalog import CATALOG, DEFAULT_MODEL
from service.models.errors import StoreError
from service.settings import (
    SETTINGS,
    Resolved,
    SettingError,
    engine_config,
    join_address,
    resolve,
    unknown_variables,
)
from service.tables import table
from service.version import VERSION

if TYPE_CHECKING:
    from service.models.store import StoredModel

EXIT_FAILED, EXIT_USAGE = 1, 2
TLS_CA_HELP = "CA of the server's certificate, PEM; with it the connection is encrypted"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(VERSION, prog_name="nemoserve")
def main() -> None:
    """Serve Mistral NeMo 12B and its dense Llama, Mistral and Qwen2 relatives over gRPC."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what the C core would print, our own errors say better


main.add_command(keys)

PLANNED = (
    *("precision", "kv_precision", "dtype", "max_model_len", "max_batch_size", "max_batch_tokens", "kv_memory"),
    *("max_draft_tokens", "tensor_parallel_size", "lora_dir", "max_loras", "max_lora_rank"),
)
"""Settings that decide what fits."""


def _options(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A flag for each of these settings."""
    return lambda command: _with_options(command, names)


def _with_options(command: Callable[..., Any], names: Collection[str]) -> Callable[..., Any]:
    """Text as given, so that flags and variables are parsed by the same code."""
    for setting in reversed(SETTINGS):
        if setting.name not in names:
            continue
        shown = "" if setting.default in (None, False) else f"  [default: {setting.default}]"
        kind: dict[str, Any] = {"flag_value": "true", "is_flag": True}
        if not setting.is_switch:
            kind = {"metavar": setting.metavar}
        option = click.option(setting.flag, setting.name, default=None, help=setting.why + shown, **kind)
        command = option(command)
    return command


@main.command()
@click.argument("model", required=False)
@_options(*(setting.name for setting in SETTINGS if setting.name != "model"))
@click.option("--sample-prompt", metavar="TEXT", help="once ready, stream the answer to this and keep serving")
@click.option("--dry-run", is_flag=True, help="print every setting and where its value comes from, then end")
@click.option("--json", "as_json", is_flag=True, help="with --dry-run: print JSON")
def serve(sample_prompt: str | None, dry_run: bool, as_json: bool, **flags: str | None) -> None:
    """Load MODEL, warm up, and serve it until SIGTERM or Ctrl-C.

    MODEL is a name of `nemoserve models`, hf://org/name[@revision], a folder of safetensors as Hugging Face or Mistral
    publish them, or a .gguf file. Every option is also a variable: NEMOSERVE_GRPC_PORT=8001.
    """
    if sample_prompt and any(flags[name] for name in ("api_keys_file", "tls_cert")):
        raise click.UsageError("--sample-prompt is for servers without keys and encryption")
    if as_json and not dry_run:
        raise click.UsageError("--json goes with --dry-run; --log-json makes the log JSON")
    with _errors():
        settings = resolve(flags, os.environ)
        if dry_run:
            for name in unknown_variables(os.environ):
                click.echo(f"nemoserve: unknown variable {name}", err=True)
            _print_settings(settings, as_json)
            return
        _serve({name: each.value for name, each in settings.items()}, sample_prompt)


def _serve(values: dict[str, Any], sample_prompt: str | None) -> None:
    import logging

    from service.logs import configure
    from service.security.access import access_of
    from service.security.tls import tls_of
    from service.server import Server, ServerConfig

    configure(values["log_level"], as_json=values["log_json"])
    for name in unknown_variables(os.environ):
        logging.getLogger(__name__).warning("unknown variable", extra={"variable": name})
    access, tls = access_of(values), tls_of(values)  # what is wrong with them is told before anything is fetched
    stored = _pull(values["model"])
    config = ServerConfig(
        engine=engine_config(stored.path, values),
        model_name=values["served_model_name"] or stored.name,
        grpc_address=join_address(values["host"], values["grpc_port"]),
        lora_dir=Path(values["lora_dir"]) if values["lora_dir"] else None,
        lora_refresh=values["lora_refresh"],
        access=access,
        tls=tls,
        max_request_bytes=values["max_request_bytes"],
        drain_timeout=values["drain_timeout"],
        progress_bar=sys.stderr.isatty() and not values["log_json"],
    )

    async def run() -> int:
        async def on_ready(address: str) -> None:
            await _welcome(config.model_name, address, sample_prompt)

        people_read = sample_prompt or not values["log_json"]
        return await Server(config).run(on_ready if people_read else None)

    sys.exit(asyncio.run(run()))


async def _welcome(model: str, address: str, sample_prompt: str | None) -> None:
    """What a person at the terminal wants to know once the model is ready."""
    from service.errors import TalkError
    from service.talk import RemotePartner, say
    from service.text.chat import Message

    if sample_prompt:
        click.echo(f"\n> {sample_prompt}\n")
        partner = RemotePartner(address, "", max_tokens=128, temperature=0.0)
        try:
            await say(partner, [Message(role="user", content=sample_prompt)], sys.stdout)
        except TalkError as error:
            click.echo(f"no sample: {error}")
        finally:
            await partner.close()
    click.echo(f"""
{model} is ready at {address} (gRPC)

  talk to it     nemoserve chat --address {address}
  typed API      nemoserve.v1.GenerationService; grpcurl -plaintext {address} list
  Triton client  as below; for TensorRT-LLM's tensor names ask for "ensemble"
  stop           Ctrl-C

import numpy, tritonclient.grpc as triton
text = triton.InferInput("text_input", [1], "BYTES")
text.set_data_from_numpy(numpy.array([b"The capital of France is"], dtype=object))
client = triton.InferenceServerClient("{address}")
print(client.infer("{model}", [text]).as_numpy("text_output")[0].decode())
""")


@main.command()
@click.argument("model", required=False)
@click.option("--address", metavar="HOST:PORT", help="talk to a running server instead of starting an engine")
@click.option("--api-key", envvar="NEMOSERVE_API_KEY", metavar="KEY", help="of yours, for a server that asks for one")
@click.option("--tls-ca", type=click.Path(exists=True, dir_okay=False, path_type=Path), help=TLS_CA_HELP)
@click.option("--once", metavar="TEXT", help="ask this, print the answer, end")
@click.option("--max-tokens", type=click.IntRange(1), help="longest answer  [default: until the model stops]")
@click.option(
    "--temperature",
    type=click.FloatRange(0, 100),
    default=0.3,  # what the authors of Mistral NeMo advise; small models ramble above it too
    show_default=True,
    help="0 = always the likeliest token",
)
def chat(
    model: str | None,
    address: str | None,
    api_key: str | None,
    tls_ca: Path | None,
    once: str | None,
    max_tokens: int | None,
    temperature: float,
) -> None:
    """Talk to MODEL, streaming. Text from a pipe is taken as one question.

    By default smollm2-135m-instruct, or with --address what the server serves. Other users of this machine can see
    --api-key; the variable NEMOSERVE_API_KEY they cannot.
    """
    question = once if once is not None else None if sys.stdin.isatty() else sys.stdin.read()
    if question is not None and not question.strip():
        raise click.UsageError("the question is empty")
    with _errors(), asyncio.Runner() as runner:
        from service.progress import load_progress
        from service.talk import LocalPartner, Partner, RemotePartner, converse, say
        from service.text.chat import Message

        async def connect() -> Partner:
            if address is not None:
                return RemotePartner(address, model or "", max_tokens, temperature, api_key=api_key, tls_ca=tls_ca)
            stored = _pull(model or DEFAULT_MODEL)
            with load_progress(stored.name, bar=sys.stderr.isatty()) as progress:
                return await LocalPartner.start(stored.path, max_tokens, temperature, progress)

        partner = runner.run(connect())
        try:
            if question is not None:
                runner.run(say(partner, [Message(role="user", content=question)], sys.stdout))
            else:
                converse(runner, partner, _line_reader())
        finally:
            runner.run(partner.close())


def _line_reader() -> Callable[[], str]:
    """`input` with line editing, where the platform has it."""
    try:
        import readline  # noqa: F401 - its import is its effect
    except ImportError:
        pass
    return lambda: input("> ")


@main.command(short_help="Fetch MODEL into the model store.")
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def pull(model: str, as_json: bool) -> None:
    """Fetch MODEL into the model store, resuming what was begun; prints its path."""
    with _errors():
        stored = _pull(model)
        click.echo(json.dumps({"name": stored.name, "path": str(stored.path)}) if as_json else str(stored.path))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def models(as_json: bool) -> None:
    """The models that have a name, and whether they are in the store."""
    from service.models.store import ModelStore

    with _errors():
        store = ModelStore.default()
        stored = {name: store.find(name) is not None for name in CATALOG}
        if as_json:
            found = [
                {
                    "name": entry.name,
                    "short_names": list(entry.short_names),
                    "parameters": entry.parameters,
                    "bytes": entry.num_bytes,
                    "licence": entry.licence,
                    "stored": stored[entry.name],
                }
                for entry in CATALOG.values()
            ]
            click.echo(json.dumps(found, indent=2))
            return
        rows = [["model", "parameters", "licence", "files"]]
        for entry in CATALOG.values():
            here = "in store" if stored[entry.name] else f"{entry.num_bytes / 1e9:.1f} GB to fetch"
            rows.append([entry.name, f"{entry.parameters / 1e9:.2f} B", entry.licence, here])
        click.echo(table(rows, left=(0, 2, 3)))


@main.command(short_help="What of MODEL fits on this machine or another, and what else troubles it.")
@click.argument("model", required=False)
@click.option("--gpu", metavar="NAME", help="plan for this GPU (h100, a100-40gb, l40s, …) instead of this machine")
@click.option("--memory", type=float, metavar="GIB", help="plan for a GPU with so much memory")
@_options("profile", "host", "grpc_port", "device", *PLANNED)
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def doctor(gpu: str | None, memory: float | None, as_json: bool, **flags: str | None) -> None:
    """Look at this machine and tell what of MODEL fits, precision by precision.

    Exit code 1 if MODEL does not fit as `nemoserve serve` with the same options and variables would run it.
    """
    from service.doctor import examine, place_of

    with _errors():
        values = {name: each.value for name, each in resolve(flags, os.environ).items()}
        found = examine(values, place_of(gpu, memory))
        click.echo(json.dumps(found.as_json(), indent=2) if as_json else found.text())
        if found.failure:
            _fail(found.failure, EXIT_FAILED)


@main.command(short_help="Profiles of MODEL: what fits where, and what serve takes.")
@click.argument("model", required=False)
@click.option("--gpu", metavar="NAME", help="only this GPU, or all that are known; does not look at this machine")
@_options("device", *(name for name in PLANNED if name != "precision"))
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def profiles(model: str | None, gpu: str | None, as_json: bool, **flags: str | None) -> None:
    """Profiles of MODEL, or of every model that has a name: what fits here, and which one `serve` takes.

    An id reads MODEL/DEVICE-PRECISION-tpN; run one with `nemoserve serve --profile ID`.
    """
    from service.doctor import list_profiles, places_of
    from service.report import profile_table

    with _errors():
        values = {name: each.value for name, each in resolve(flags, os.environ).items()}
        found = list_profiles([model] if model else [*CATALOG], places_of(gpu), values)
        click.echo(json.dumps([each.as_json() for each in found], indent=2) if as_json else profile_table(found))


def _pull(model: str) -> StoredModel:
    """The model; shows the progress if something has to be fetched."""
    from service.models.store import ModelStore

    store = ModelStore.default()
    if (stored := store.find(model)) is not None:
        return stored
    from service.progress import pull_progress

    with pull_progress(model) as progress:
        return store.pull(model, progress)


def _print_settings(settings: dict[str, Resolved], as_json: bool) -> None:
    if as_json:
        found = {name: {"value": each.value, "source": each.source} for name, each in settings.items()}
        click.echo(json.dumps(found, indent=2))
        return
    rows = [["setting", "value", "from"]]
    rows += [[name, "auto" if each.value is None else str(each.value), each.source] for name, each in settings.items()]
    click.echo(table(rows, left=(0, 1, 2)))


@contextmanager
def _errors() -> Iterator[None]:
    """What a person can act on is one line on stderr; everything else is a traceback, for us."""
    from engine import EngineError
    from service.errors import ServiceError, TalkError
    from service.security.errors import SecurityError

    try:
        yield
    except SettingError as error:
        _fail(str(error), EXIT_USAGE)
    except (StoreError, EngineError, ServiceError, SecurityError, TalkError) as error:
        _fail(str(error), EXIT_FAILED)
    except BrokenPipeError:  # whoever read our output has enough: no failure to tell of
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(where + (error.strerror or str(error)), EXIT_FAILED)


def _fail(message: str, code: int) -> None:
    click.echo(f"nemoserve: {message}", err=True)
    sys.exit(code)
