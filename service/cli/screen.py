"""Reports on a terminal get colour; what a program reads, and what NO_COLOR asks for, stays plain text."""

from __future__ import annotations

import sys

import click

# What the words of our reports are. The text itself is the same with and without.
_STYLES = {"good": "green", "bad": "red", "tight": "yellow", "chosen": "bold cyan", "head": "bold"}
_WORDS = (
    r"^(?P<good>ok)  ",
    r"^(?P<bad>!!)  ",
    r"^(?P<chosen>->)",
    r"(?P<good>fits)$",
    r"(?P<tight>tight\b.*)$",
    r"(?P<bad>[\d.]+ GiB short\b.*)$",
    r"^(?P<head>runs here|tight|does not fit)$",
    r"^(?P<chosen>chosen here:)",
)


def show(text: str) -> None:
    """Print a report. rich knows NO_COLOR, FORCE_COLOR and dumb terminals."""
    if not sys.stdout.isatty():
        click.echo(text)
        return
    from rich.console import Console
    from rich.text import Text
    from rich.theme import Theme

    shown = Text(text)
    for words in _WORDS:
        shown.highlight_regex(f"(?m){words}")
    Console(theme=Theme(_STYLES), highlight=False).print(shown, soft_wrap=True)
