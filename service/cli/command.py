"""What the commands of `nemoserve` share: flags made of settings, errors as one line, models fetched with a bar."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import click

from service.cli.screen import show
from service.models.errors import StoreError
from service.settings.definitions import SECTIONS, SETTINGS
from service.settings.resolve import SettingError

if TYPE_CHECKING:
    from service.models.store import StoredModel

EXIT_FAILED, EXIT_USAGE = 1, 2
COLUMN = 30  # of flags in `--help`, the widest that click sets them in: one for all sections

PLANNED = (
    *("precision", "kv_precision", "dtype", "max_model_len", "max_batch_size", "max_batch_tokens", "kv_memory"),
    *("max_draft_tokens", "tensor_parallel_size", "lora_dir", "max_loras", "max_lora_rank"),
)
"""Settings that decide what fits."""

Command = Callable[..., Any]


class Sectioned(click.Command):
    """A command whose `--help` has settings under their headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        headings = {name: heading for heading, names in SECTIONS.items() for name in names}
        sections: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            if isinstance(option, click.Option) and (record := option.get_help_record(ctx)) is not None:
                flags, why = record
                sections.setdefault(headings.get(option.name or "", "Options"), []).append((flags.ljust(COLUMN), why))
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def options(*names: str) -> Callable[[Command], Command]:
    """A flag for each of these settings."""
    return lambda command: _with_options(command, names)


def _with_options(command: Command, names: Collection[str]) -> Command:
    """Text as given, so that flags and variables are parsed by the same code."""
    for setting in reversed(SETTINGS):
        if setting.name not in names:
            continue
        shown = "" if setting.is_switch or not setting.shown_default else f"  [default: {setting.shown_default}]"
        kind: dict[str, Any] = {"flag_value": "true", "is_flag": True}
        if not setting.is_switch:
            kind = {"metavar": setting.metavar}
        option = click.option(setting.flag, setting.name, default=None, help=setting.why + shown, **kind)
        command = option(command)
    return command


def as_json(why: str = "print JSON") -> Callable[[Command], Command]:
    """The flag --json, as argument `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help=why)


def grpc_address(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Callback of an option that takes HOST:PORT."""
    if value is not None and (value.startswith(("http://", "https://")) or not value.rpartition(":")[2].isdecimal()):
        raise click.BadParameter(f"{value!r} must be HOST:PORT of the gRPC port, such as localhost:8001")
    return value


def echo_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2))


class Report(Protocol):
    """What a command has found. `failure`: why it ends with 1."""

    @property
    def failure(self) -> str | None: ...

    def as_json(self) -> Any: ...

    def text(self) -> str: ...


def show_report(found: Report, *, as_json: bool) -> None:
    """Print it and, where it says that something fails, end."""
    if as_json:
        echo_json(found.as_json())
    else:
        show(found.text())
    if found.failure:
        fail(found.failure, EXIT_FAILED)


def fetch(model: str) -> StoredModel:
    """The model; shows the progress if something has to be fetched. SIGTERM ends that as Ctrl-C does: the lock of the
    store is given back, which others would wait for otherwise."""
    from service.models.store import ModelStore

    store = ModelStore.default()
    if (stored := store.find(model)) is not None:
        return stored
    from service.progress import pull_progress

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pull_progress(model) as progress:
            return store.pull(model, progress)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def errors() -> Iterator[None]:
    """What a person can act on is one line on stderr; everything else is a traceback, for us."""
    from engine import EngineError
    from service.errors import ServiceError, TalkError
    from service.security.errors import SecurityError

    try:
        yield
    except SettingError as error:
        fail(str(error), EXIT_USAGE)
    except (StoreError, EngineError, ServiceError, SecurityError, TalkError) as error:
        fail(str(error), EXIT_FAILED)
    except BrokenPipeError:  # whoever read our output has enough: no failure to tell of
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(where + (error.strerror or str(error)), EXIT_FAILED)


def fail(message: str, code: int) -> NoReturn:
    click.echo(f"nemoserve: {message}", err=True)
    sys.exit(code)
