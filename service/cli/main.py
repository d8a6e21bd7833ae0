"""`nemoserve`: the command line. Exit codes: 0 done, 1 failed, 2 wrong usage, 70 the engine was lost while serving.

Imports are made where they are needed: `--help` must not wait for gRPC.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from service.bench.command import bench
from service.cli.command import Sectioned, errors, fetch, grpc_address, options, show_report
from service.cli.command import as_json as json_option
from service.cli.keys import keys
from service.cli.models import COMMANDS
from service.models.catalog import DEFAULT_MODEL
from service.security.exposure import encrypts
from service.settings.definitions import SETTINGS, engine_config, join_address, queue_limits
from service.settings.parsing import AUTO
from service.settings.resolve import Resolved, resolve, unknown_variables
from service.version import VERSION

NIM_NAMES = {
    "nim-serve": "serve",
    "list-model-profiles": "profiles",
    "download-to-cache": "pull",
    "create-model-store": "store",
}
"""What NIM calls the same, for its scripts and charts."""
LAME_DUCK_SECONDS = 5.0  # Kubernetes tells everybody that an endpoint is gone within a few
CONNECTION_SECONDS = 60.0  # as fast as servers come; a handshake a minute costs a client nothing that one could measure
TLS_CA_HELP = "CA of the server's certificate, PEM; with it the connection is encrypted"


class Commands(click.Group):
    """Commands under our names and under NIM's, which `--help` does not list a second time."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, NIM_NAMES.get(cmd_name, cmd_name))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(VERSION, prog_name="nemoserve")
def main() -> None:
    """Serve Mistral NeMo 12B and its dense Llama, Mistral and Qwen2 relatives over gRPC and HTTP."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what the C core would print, our own errors say better


for _command in (*COMMANDS, keys, bench):
    main.add_command(_command)


@main.command(cls=Sectioned)
@click.argument("model", required=False)
@options(*(setting.name for setting in SETTINGS if setting.name != "model"))
@click.option("--sample-prompt", metavar="TEXT", help="once ready, stream the answer to this and keep serving")
@click.option("--dry-run", is_flag=True, help="print every setting, where its value comes from and what fits, then end")
@json_option("with --dry-run: print JSON")
def serve(sample_prompt: str | None, dry_run: bool, as_json: bool, **flags: str | None) -> None:
    """Load MODEL, warm up, and serve it until SIGTERM or Ctrl-C.

    MODEL is a name of `nemoserve models`, hf://org/name[@revision], a folder of safetensors as Hugging Face or Mistral
    publish them, or a .gguf file; by default smollm2-135m-instruct. Every setting is also a variable, such as
    NEMOSERVE_GRPC_PORT, and may stand in the file of --config.
    """
    if as_json and not dry_run:
        raise click.UsageError("--json goes with --dry-run; --log-json makes the log JSON")
    with errors():
        settings = _with_profile(resolve(flags, os.environ), flags)
        if dry_run:
            for name, near in unknown_variables(os.environ).items():
                hint = f"; did you mean {near}?" if near else ""
                click.echo(f"nemoserve: unknown variable {name}{hint}", err=True)
            _dry_run(settings, as_json)
            return
        values = {name: each.value for name, each in settings.items()}
        if sample_prompt and (values["api_keys_file"] or encrypts(values)):
            raise click.UsageError("--sample-prompt is for servers without keys and encryption")
        _serve(values, sample_prompt)


def _with_profile(settings: dict[str, Resolved], flags: dict[str, str | None]) -> dict[str, Resolved]:
    """The same settings with the profile that `auto` comes to here."""
    asked = settings["profile"]
    if asked.value != AUTO:
        return settings
    from service.cli.doctor import choose

    chosen = choose({name: each.value for name, each in settings.items()}).id
    return resolve({**flags, "profile": chosen}, os.environ) | {"profile": Resolved(chosen, asked.source)}


def _serve(values: dict[str, Any], sample_prompt: str | None) -> None:
    import logging

    from service.cli.doctor import refuse_before_fetching
    from service.loading import find_in
    from service.logs import configure
    from service.management import Package
    from service.models.download import shown
    from service.models.store import ModelStore
    from service.security.access import access_of
    from service.security.exposure import is_loopback
    from service.security.tls import tls_of
    from service.server import LAST_WORDS_SECONDS, Server, ServerConfig

    configure(values["log_level"], as_json=values["log_json"])
    for name, near in unknown_variables(os.environ).items():
        hint = {"did_you_mean": near} if near else {}
        logging.getLogger(__name__).warning("unknown variable", extra={"variable": name, **hint})
    access, tls = access_of(values), tls_of(values)  # what is wrong with them is told before anything is fetched
    store, model = ModelStore.default(), values["model"]

    def among_others(name: str, seconds: float) -> float:
        """On loopback there is nobody to be told."""
        default = 0.0 if is_loopback(values["host"]) else seconds
        return default if values[name] is None else float(values[name])

    store.refuse_what_may_not_be_fetched(model)
    refuse_before_fetching(values)
    wanted = store.resolve(model)
    name, *aliases = values["served_model_name"] or (wanted.name,)
    config = ServerConfig(
        engine=engine_config(wanted.path, values),
        model_name=name,
        model_aliases=tuple(aliases),
        grpc_address=join_address(values["host"], values["grpc_port"]),
        http_address=None if values["http_port"] is None else join_address(values["host"], values["http_port"]),
        lora_dir=Path(values["lora_dir"]) if values["lora_dir"] else None,
        lora_refresh=values["lora_refresh"],
        access=access,
        tls=tls,
        max_request_bytes=values["max_request_bytes"],
        lame_duck=among_others("lame_duck", LAME_DUCK_SECONDS),
        max_connection_age=among_others("max_connection_age", CONNECTION_SECONDS),
        queue=queue_limits(values),
        drain_timeout=values["drain_timeout"],
        engine_restarts=values["engine_restarts"],
        engine_timeout=values["engine_timeout"],
        model_control=values["model_control"] == "explicit",
        progress_bar=sys.stderr.isatty() and not values["log_json"],
        metrics_aliases=values["metrics_aliases"],
        otlp_endpoint=values["otlp_endpoint"],
        trace_content=values["trace_content"],
        repository_override=shown(os.environ.get("HF_ENDPOINT", "")),
    )

    server: Server | None = None

    async def run() -> int:
        async def on_ready(address: str) -> None:
            assert server is not None
            keys, tls = config.access.keys is not None, config.tls is not None
            await _welcome(config.model_name, address, server.ports.http_address, sample_prompt, keys=keys, tls=tls)

        nonlocal server
        people_read = sample_prompt or not values["log_json"]
        fetch = None if store.find(model) else lambda progress: store.pull(model, progress)
        describe = functools.partial(Package.of, store)
        server = Server(config, fetch=fetch, find=find_in(store, config.engine), describe=describe)
        return await server.run(on_ready if people_read else None)

    code = asyncio.run(run())
    if server is not None and server.abandoned(LAST_WORDS_SECONDS):  # a download whose server sends nothing
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


async def _welcome(
    model: str, address: str, http_address: str | None, sample_prompt: str | None, *, keys: bool, tls: bool
) -> None:
    """What a person at the terminal wants to know once the model is ready."""
    from service.cli.talk import RemotePartner, say
    from service.errors import TalkError
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
    http = f"http{'s' if tls else ''}://{http_address}"
    openai = f" and {http}/v1 (OpenAI)" if http_address else ""
    page = f"\n  in a browser   {http}/" if http_address else ""
    chat = (" --tls-ca CA.pem" if tls else "") + (" --api-key KEY" if keys else "")
    grpcurl = ("-cacert CA.pem" if tls else "-plaintext") + (" -H 'x-api-key: KEY'" if keys else "")
    client = ', ssl=True, root_certificates="CA.pem"' if tls else ""
    headers = ', headers={"x-api-key": "KEY"}' if keys else ""
    click.echo(f"""
{model} is ready at {address} (gRPC){openai}

  talk to it     nemoserve chat --address {address}{chat}{page}
  typed API      nemoserve.v1.GenerationService; grpcurl {grpcurl} {address} list
  Triton client  as below; for TensorRT-LLM's tensor names ask for "ensemble"
  stop           Ctrl-C

import numpy, tritonclient.grpc as triton
text = triton.InferInput("text_input", [1], "BYTES")
text.set_data_from_numpy(numpy.array([b"The capital of France is"], dtype=object))
client = triton.InferenceServerClient("{address}"{client})
print(client.infer("{model}", [text]{headers}).as_numpy("text_output")[0].decode())
""")


@main.command()
@click.argument("model", required=False)
@click.option(
    "--address",
    metavar="HOST:PORT",
    callback=grpc_address,
    help="talk to a running server, at its gRPC port, instead of starting an engine",
)
@click.option("--api-key", envvar="NEMOSERVE_API_KEY", metavar="KEY", help="yours, for a server that asks for one")
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
    with errors(), asyncio.Runner() as runner:
        from service.cli.talk import LocalPartner, Partner, RemotePartner, converse, say
        from service.progress import load_progress
        from service.text.chat import Message

        async def connect() -> Partner:
            if address is not None:
                return RemotePartner(address, model or "", max_tokens, temperature, api_key=api_key, tls_ca=tls_ca)
            stored = fetch(model or DEFAULT_MODEL)
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


def _dry_run(settings: dict[str, Resolved], as_json: bool) -> None:
    from service.cli.dry_run import dry_run

    show_report(dry_run(settings), as_json=as_json)
