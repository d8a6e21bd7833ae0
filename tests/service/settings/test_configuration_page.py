"""docs/configuration.md and docs/nim.md have every setting as it is today. Run as a program, this writes their tables
anew: `python -m tests.service.settings.test_configuration_page`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from service.cli.main import NIM_NAMES, main
from service.settings.definitions import SECTIONS, SETTINGS, Setting
from service.settings.resolve import OTHER_VARIABLES, unknown_variables

DOCS = Path(__file__).resolve().parents[3] / "docs"
PAGE, NIM_PAGE = DOCS / "configuration.md", DOCS / "nim.md"
BEGIN, END = "<!-- settings -->\n", "<!-- end -->"


def current(page: Path) -> str:
    """The page with its table replaced."""
    head, _, rest = page.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + BEGIN + "\n".join(table() if page == PAGE else nim_table()) + "\n" + END + tail


def table() -> list[str]:
    settings = {setting.name: setting for setting in SETTINGS}
    lines = []
    for heading, names in SECTIONS.items():
        lines += [f"### {heading}", "", "| flag | variable | NIM's | default | |", "|---|---|---|---|---|"]
        lines += [*(row(settings[name]) for name in names), ""]
    return lines[:-1]


def nim_table() -> list[str]:
    rows = [f"| `{each.alias}` | `{each.flag}` | `{each.variable}` |" for each in SETTINGS if each.alias]
    return ["| NIM | flag | variable |", "|---|---|---|", *rows]


def row(setting: Setting) -> str:
    flag = setting.flag if setting.is_switch or setting.name == "model" else f"{setting.flag} {setting.metavar}"
    default = f"`{setting.shown_default}`" if setting.shown_default else ""
    alias = f"`{setting.alias}`" if setting.alias else ""
    cells = (f"`{flag}`", f"`{setting.variable}`", alias, default, setting.why)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


@pytest.mark.parametrize("page", [PAGE, NIM_PAGE])
def test_the_page_has_every_setting(page: Path) -> None:
    assert current(page) == page.read_text()


def test_every_setting_has_its_heading() -> None:
    assert [name for names in SECTIONS.values() for name in names] == [setting.name for setting in SETTINGS]


def test_the_page_names_no_variable_that_means_nothing() -> None:
    named = re.findall(r"\b(?:NEMOSERVE|NIM)_[A-Z_]+[A-Z]\b", PAGE.read_text())
    assert set(OTHER_VARIABLES[:-1]) <= set(named)
    assert unknown_variables(named) == {}


@pytest.mark.parametrize("name", NIM_NAMES)
def test_commands_of_nim_are_told_of(name: str) -> None:
    assert f"`{name}`" in NIM_PAGE.read_text()


@pytest.mark.parametrize("name", NIM_NAMES.values())
def test_what_nim_names_is_a_command_of_ours(name: str) -> None:
    assert name in main.commands


if __name__ == "__main__":
    for each in (PAGE, NIM_PAGE):
        each.write_text(current(each))
