"""Commands about models: those that have a name, those that are here, what of them fits where.

Imports are made where they are needed, as in `service.cli.main`.
"""

from __future__ import annotations

import os

import click

from service.cli.command import (
    PLANNED,
    Sectioned,
    as_json,
    echo_json,
    errors,
    fetch,
    options,
    show_report,
)
from service.cli.tables import table
from service.models.catalog import CATALOG
from service.settings.resolve import resolve, resolve_model


def _asked(model: str | None, profile: str | None, uri: str | None) -> str:
    """The one model that is meant: an argument as we take it, an option as NIM does, or what `serve` would take."""
    given = [each for each in (model, profile, uri) if each is not None]
    if len(given) > 1:
        raise click.UsageError("MODEL, --profile and --model-uri name a model each: give one of them")
    return resolve_model({"model": model or uri, "profile": profile}, os.environ)


SECURITY = ("allow_anonymous", "api_keys_file", "tls_mode", "tls_cert", "tls_key", "tls_client_ca")
_PROFILE = click.option("-p", "--profile", metavar="ID", help="of `nemoserve profiles`: its model, as NIM asks for it")
_URI = click.option("--model-uri", "--model-repo", "uri", metavar="URI", help="the same as MODEL, as NIM names it")


@click.command(short_help="Fetch MODEL into the model store.")
@click.argument("model", required=False)
@_PROFILE
@_URI
@as_json()
def pull(model: str | None, profile: str | None, uri: str | None, as_json: bool) -> None:
    """Fetch MODEL into the model store, resuming what was begun, and print its path.

    MODEL is a name of `nemoserve models` or hf://org/name[@revision]; by default what `serve` would take.
    """
    with errors():
        stored = fetch(_asked(model, profile, uri))
        if as_json:
            echo_json({"name": stored.name, "path": str(stored.path)})
        else:
            click.echo(str(stored.path))


@click.command(short_help="Write MODEL to a folder of its own, for machines without a network.")
@click.argument("model", required=False)
@_PROFILE
@_URI
@click.option("--to", "-m", "--model-store", "to", metavar="DIR", required=True, help="an empty folder, or a new one")
@as_json()
def store(model: str | None, profile: str | None, uri: str | None, to: str, as_json: bool) -> None:
    """Write MODEL and its checksums to DIR, which `nemoserve serve DIR` takes on any machine, and print DIR.

    MODEL is fetched first unless it is in the store; by default it is what `serve` would take.
    """
    from pathlib import Path

    from service.models.export import export
    from service.models.store import ModelStore
    from service.progress import pull_progress

    with errors():
        name = _asked(model, profile, uri)
        fetch(name)
        folder = Path(to).expanduser()
        with pull_progress(f"{name} to {folder}", "write") as progress:
            manifest = export(ModelStore.default(), name, folder, progress)
        if as_json:
            echo_json({"name": manifest.name, "path": str(folder), "bytes": manifest.num_bytes})
        else:
            click.echo(str(folder))


@click.command()
@as_json()
def models(as_json: bool) -> None:
    """List the models that have a name, and which of them are in the store."""
    from service.cli.screen import show
    from service.models.store import ModelStore

    with errors():
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
            echo_json(found)
            return
        rows = [["model", "parameters", "licence", "files"]]
        for entry in CATALOG.values():
            here = "in store" if stored[entry.name] else f"{entry.num_bytes / 1e9:.1f} GB to fetch"
            rows.append([entry.name, f"{entry.parameters / 1e9:.2f} B", entry.licence, here])
        show(table(rows, left=(0, 2, 3)))


@click.command(cls=Sectioned, short_help="Check this machine, and which precisions of MODEL fit on it or on another.")
@click.argument("model", required=False)
@click.option("--gpu", metavar="NAME", help="plan for this GPU (h100, a100-40gb, l40s, …) instead of this machine")
@click.option("--memory", type=float, metavar="GIB", help="plan for a GPU with so much memory, in GiB")
@options("profile", "config", "host", "http_port", "grpc_port", *SECURITY, "device", *PLANNED)
@as_json()
def doctor(gpu: str | None, memory: float | None, as_json: bool, **flags: str | None) -> None:
    """Check this machine, and which precisions of MODEL fit on it, or on another with --gpu or --memory.

    Exit code 1 if `nemoserve serve` with the same options and variables would not start: MODEL does not fit, a port is
    taken, there is no room for what is to be fetched.
    """
    from service.cli.doctor import examine, place_of

    with errors():
        values = {name: each.value for name, each in resolve(flags, os.environ).items()}
        show_report(examine(values, place_of(gpu, memory)), as_json=as_json)


@click.command(
    cls=Sectioned, short_help="List the profiles of MODEL: what fits here or elsewhere, and what serve takes."
)
@click.argument("model", required=False)
@click.option(
    "--gpu", metavar="NAME", help="plan for this GPU (h100, l40s, …; all: every known one) and not this machine"
)
@options("config", "device", *(name for name in PLANNED if name != "precision"))
@as_json()
def profiles(model: str | None, gpu: str | None, as_json: bool, **flags: str | None) -> None:
    """List the profiles of MODEL, or of every model that has a name: what fits here, and which one `serve` takes.

    An id reads MODEL/DEVICE-PRECISION-tpN; run one with `nemoserve serve --profile ID`.
    """
    from service.cli.doctor import list_profiles, places_of
    from service.cli.report import profile_table, taken_line
    from service.cli.screen import show

    with errors():
        settings = resolve(flags, os.environ)
        values = {name: each.value for name, each in settings.items()}
        found = list_profiles([model] if model else [*CATALOG], places_of(gpu), values)
        if as_json:
            echo_json([each.as_json() for each in found])
            return
        taken = [each for each in found if each.taken]
        chosen = f"\n\n{taken_line(taken[0], settings['precision'].source)}" if len(taken) == 1 else ""
        show(profile_table(found) + chosen)


COMMANDS = (pull, store, models, doctor, profiles)
