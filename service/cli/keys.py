"""`nemoserve keys`: makes keys, so that nobody has to think one up or work out a digest."""

from __future__ import annotations

from pathlib import Path

import click

from service.cli.command import EXIT_USAGE, echo_json, errors, fail
from service.cli.command import as_json as json_option


@click.group()
def keys() -> None:
    """Make API keys for tenants, for `nemoserve serve --api-keys-file FILE`.

    \b
    The file is YAML, a list with an entry for each tenant:
      - name: search               the tenant, as logs and metrics know it
        sha256: 5f0c…              of its key; a list while one key replaces another
        weight: 2                  share of the engine beside others, 1 if not said
        max_running: 8             requests at once; further ones wait
        max_queued: 64             requests waiting; further ones are refused
        tokens_per_minute: 600000  of prompts and answers
      - name: operations
        sha256: c1d2…
        admin: true                may also change what is served
      - name: billing
        certificate: true          no key: the client certificate of this name (mTLS)

    A running server takes a changed file within a second.
    """


@keys.command(short_help="Make a key for the tenant NAME.")
@click.argument("name")
@click.option("--admin", is_flag=True, help="the tenant may also change what is served")
@click.option("--file", type=click.Path(dir_okay=False, path_type=Path), help="put the entry into this keys file")
@json_option()
def new(name: str, admin: bool, file: Path | None, as_json: bool) -> None:
    """Make a key for the tenant NAME and print it, this once: the keys file has only its digest.

    Without --file, what to put into the file is printed as well.
    """
    from service.security.errors import SecurityError
    from service.security.keys import add_entry, entry_of, new_key

    key = new_key()
    try:
        entry = entry_of(name, key, admin=admin)
    except SecurityError as error:
        fail(f"NAME: {error}", EXIT_USAGE)
    with errors():
        if file is not None:
            add_entry(file, entry)
    if as_json:
        echo_json({"name": name, "key": key, "entry": entry})
    elif file is not None:
        click.echo(key)
    else:
        click.echo(f"{key}\n\n{entry}", nl=False)
