"""`nemoserve bench`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import click

from service.cli.command import EXIT_FAILED, errors, grpc_address
from service.cli.command import as_json as json_option


@click.command(context_settings={"show_default": True}, short_help="Put load on a server and time its answers.")
@click.option(
    "--address",
    metavar="HOST:PORT",
    callback=grpc_address,
    help="a nemoserve, at its gRPC port  [default: 127.0.0.1:8001]",
)
@click.option("--url", metavar="URL", help="any server with OpenAI's /v1/completions, over HTTP, instead")
@click.option(
    "--model", default="", show_default=False, metavar="NAME", help="one of its models; by default the first it names"
)
@click.option("--api-key", envvar="NEMOSERVE_API_KEY", metavar="KEY", help="yours, for a server that asks for one")
@click.option(
    "--tls-ca",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CA of the server's certificate, PEM; with it a gRPC connection is encrypted",
)
@click.option("--requests", type=click.IntRange(1), default=64, help="in all")
@click.option("--concurrency", type=click.IntRange(1), default=8, help="requests at once; with --rate, at most")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="requests per second, at random times (Poisson)")
@click.option("--prompt-words", type=click.IntRange(1), default=128, help="of each prompt, about as many tokens")
@click.option("--new-tokens", type=click.IntRange(1), default=128, help="of each answer")
@click.option("--until-end", is_flag=True, help="an answer may end before that, when the model says so")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, help="0 = always the likeliest token")
@click.option("--seed", type=int, default=0, help="of the prompts; give another one to each round")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.svg", help="draw the times")
@json_option("print JSON, with every time to first token and every gap")
def bench(
    address: str | None,
    url: str | None,
    model: str,
    api_key: str | None,
    tls_ca: Path | None,
    requests: int,
    concurrency: int,
    rate: float | None,
    prompt_words: int,
    new_tokens: int,
    until_end: bool,
    temperature: float,
    seed: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Put load on a running server; tell how many tokens per second it makes and how long answers take.

    No two prompts are alike, so that no cache helps. Without --rate there are always --concurrency requests at once,
    which finds the most that the server does; with it requests come at random times, as in real life, and a wait for
    a place counts.
    """
    if address is not None and url is not None:
        raise click.UsageError("--address and --url are two ways to say which server")
    import msgspec

    from service.bench.clients import Client, OpenAIClient, TypedClient
    from service.bench.load import Measured, Plan, measure
    from service.bench.report import plot as picture
    from service.bench.report import text

    plan = Plan(
        requests=requests,
        concurrency=concurrency,
        rate=rate,
        prompt_words=prompt_words,
        new_tokens=new_tokens,
        ignore_eos=not until_end,
        temperature=temperature,
        seed=seed,
    )
    watched = sys.stderr.isatty()

    def told(ended: int) -> None:
        if watched:
            click.echo(f"\r{ended} of {requests} requests", err=True, nl=ended == requests)

    async def run() -> Measured:
        client: Client
        if url is not None:
            client = openai = OpenAIClient(url, model, api_key, tls_ca, concurrency)
            await openai.find_model()
        else:
            client = TypedClient(address or "127.0.0.1:8001", model, api_key, tls_ca)
        try:
            return await measure(client, plan, told)
        finally:
            await client.close()

    with errors():
        result = asyncio.run(run())
        if plot is not None:
            plot.write_text(picture(result))
    click.echo(msgspec.json.format(msgspec.json.encode(result), indent=2).decode() if as_json else text(result))
    if not result.completed:
        sys.exit(EXIT_FAILED)
