"""What the pages name is there: links and headings, commands and their options, values of the chart, metrics.

Whether a page says everything is held by the tests of its room; this one holds what any page may name in passing.
"""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from pathlib import Path

import click
import pytest

from autoscaler.controller.metrics import Metrics
from autoscaler.main import cli
from helm.chart import SCHEMA
from service.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "helm" / "nemoserve"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), CHART / "README.md", *ROOT.glob("proto/*.md")])
OF_OTHERS = {
    "--set": "helm",
    "--skip-crds": "helm",
    "--profiles": "NIM's download-to-cache, as what is not there",
    "--all": "the same",
    "--lora": "the same",
}
"""Options that stand alone in a page and are not ours."""


@cache
def text(page: Path) -> str:
    return page.read_text()


@cache
def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    prose = re.sub(r"^ *```.*?^ *```$", "", text(page), flags=re.MULTILINE | re.DOTALL)
    titles = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", each) for each in re.findall(r"^#+ (.+)$", prose, re.MULTILINE))
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in titles}


def goes_nowhere(page: Path, link: str) -> bool:
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    return not target.exists() or (bool(anchor) and anchor not in anchors(target))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", text(page))
    assert [each for each in links if "://" not in each and goes_nowhere(page, each)] == []


# -- commands and options --------------------------------------------------------------------------------------


def commands(program: str) -> list[str]:
    """Of all pages, `$ program …` of console blocks and `program …` in a line, without comments."""
    found = []
    for page in PAGES:
        found += re.findall(rf"^ *\$ (?:[A-Z_]+=\S+ )*({program}(?: (?:.*\\\n)*.*)?)$", text(page), re.MULTILINE)
        found += re.findall(rf"`({program}(?: [^`\n]*)?)`", text(page))
    return sorted({shlex.join(shlex.split(each.replace("\\\n", " "), comments=True)) for each in found})


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that these words call, and what is said to it."""
    command: click.Command = main
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(click.Context(command), words[0])
        assert found is not None, f"nemoserve has no {words[0]}"
        command, words = found, words[1:]
    return command, words


def options(command: click.Command) -> set[str]:
    of_here = {name for each in command.params for name in (*each.opts, *each.secondary_opts) if name.startswith("-")}
    return {"--help", "--version"} | of_here


@cache
def options_of_source(module: str) -> set[str]:
    """Of a program that is run by `python -m`, from its text: to import it may take seconds."""
    place = ROOT / module.replace(".", "/")
    files = list(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    shared = [ROOT / "bench" / "options.py", *(ROOT / "autoscaler" / "simulate").glob("*.py")]
    return set(
        re.findall(r'(?<=[/"])(--[a-z][a-z0-9-]*)(?=[/"])', "".join(each.read_text() for each in [*files, *shared]))
    )


@pytest.mark.parametrize("shown", commands("nemoserve"))
def test_commands_are_as_the_program_takes_them(shown: str) -> None:
    command, words = command_of([each for each in shlex.split(shown)[1:] if each not in ("…", "A", "B")])
    given = {each.partition("=")[0] for each in words if each.startswith("-") and len(each) > 1}
    assert given - options(command) == set()


@pytest.mark.parametrize("shown", commands(r"python -m (?:bench|autoscaler|engine|tests)\.[\w.]+"))
def test_programs_are_there_and_take_what_is_shown(shown: str) -> None:
    module, *words = shlex.split(shown)[2:]
    place = ROOT / module.replace(".", "/")
    assert place.with_suffix(".py").exists() or (place / "__main__.py").exists()
    assert {each for each in words if each.startswith("--")} - options_of_source(module) == set()


def test_options_that_are_named_exist() -> None:
    def every(command: click.Command) -> set[str]:
        below = command.commands.values() if isinstance(command, click.Group) else ()
        return options(command).union(*(every(each) for each in below))

    known = every(main) | every(cli) | options_of_source("bench") | set(OF_OTHERS)
    named = {each: page.name for page in PAGES for each in re.findall(r"`(--[a-z][a-z0-9-]*)", text(page))}
    assert {name: page for name, page in named.items() if name not in known} == {}
    assert set(OF_OTHERS) - set(named) == set()


# -- the chart's values, and metrics ----------------------------------------------------------------------------


def is_a_value(path: str) -> bool:
    """By the schema: a property, or anything below a map of free keys."""
    node = json.loads(SCHEMA.read_text())
    for name in path.split("."):
        if "properties" not in node:
            return bool(node.get("type") == "object")
        if name not in node["properties"]:
            return False
        node = node["properties"][name]
    return True


def test_values_that_are_named_exist() -> None:
    first = "|".join(json.loads(SCHEMA.read_text())["properties"])
    pattern = rf"(?:`|--set |,)((?:{first})(?:\.(?!md|py|safetensors)[a-zA-Z_]+)+)(?=[`=:,])"
    files = [*PAGES, CHART / "values.yaml", *CHART.rglob("templates/**/*.t*"), *CHART.glob("ci/*.yaml")]
    named = {each: path.name for path in files for each in re.findall(pattern, path.read_text())}
    assert len(named) > 50
    assert {each: page for each, page in named.items() if not is_a_value(each)} == {}


def test_metrics_that_are_named_exist() -> None:
    """docs/observability.md has every metric of servers, and other tests hold it to what one exposes."""
    servers = re.findall(r"\bnemoserve_[a-z_]+", text(ROOT / "docs" / "observability.md"))
    known = {*servers, *(each.name for each in Metrics().registry.collect())}
    named = {each: page.name for page in PAGES for each in re.findall(r"`(nemoserve_[a-z_]+)(?![a-z_…*])", text(page))}
    assert len(named) > 20
    assert {each: page for each, page in named.items() if not {each, each.removesuffix("_total")} & known} == {}
