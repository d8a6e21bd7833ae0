"""Options that several programs of bench/ have, and the models that they name."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

import click

from bench.measure import Facts
from engine.checkpoint import open_checkpoint

_ROOT = Path(__file__).resolve().parent.parent
# Where the files of `bench.texts` are looked for.
TEXTS = Path(os.environ.get("NEMOSERVE_TEST_DATA", _ROOT.parent / "shared" / "data")) / "text"


def numbers(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    """Reads an option that is a list of positive numbers, separated by commas."""
    try:
        found = [int(part) for part in value.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise click.BadParameter(f"{value!r} is no list of positive numbers")
    return found


def names(allowed: Collection[str]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Reads an option that is a list of names, separated by commas; "" is an empty one."""

    def read(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
        found = [name for name in value.split(",") if name]
        if unknown := [name for name in found if name not in allowed]:
            raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(allowed)}")
        return found

    return read


def model_path(model: str) -> Path:
    """Of a file, a folder, or a name of the catalogue, which is pulled."""
    if Path(model).exists():
        return Path(model).resolve()
    from service.models.store import ModelStore

    return ModelStore.default().pull(model).path


def facts_of(model: Path) -> Facts:
    """What rates are worked out from."""
    with open_checkpoint(str(model)) as checkpoint:
        config = checkpoint.config
        looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        return Facts(
            vocab_size=config.vocab_size,
            parameters=checkpoint.num_parameters,
            streamed_parameters=checkpoint.num_parameters - looked_up,
        )
