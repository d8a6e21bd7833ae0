"""docs/operations.md: sizes are what the program works out, commands are rendered. Run as a program, this writes the
table of sizes anew: `python -m tests.helm.test_operations_page`.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from helm.chart import objects
from helm.readme import PAGE as README
from helm.tools import HELMS, run
from service.cli.main import main
from tests.helm.conftest import one, rendered

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "operations.md"
ZERO = ROOT / "docs" / "scale-to-zero.md"
BEGIN, END = "<!-- sizes -->\n", "<!-- end -->"
CARDS = ("a100-40gb", "a100-80gb", "h100", "h200")
LENGTHS = (8_192, 32_768, 131_072)


def table() -> str:
    head = "| card | weights | KV cache | tokens | " + " | ".join(f"× {length:,}" for length in LENGTHS) + " |"
    return "\n".join([head, "|---|---|---|" + "--:|" * (1 + len(LENGTHS)), *rows()]) + "\n"


def rows() -> Iterator[str]:
    for card in CARDS:
        for kv in ("bf16", "fp8"):
            command = ["profiles", "mistral-nemo-12b-instruct", "--gpu", card, "--kv-precision", kv, "--json"]
            printed = CliRunner().invoke(main, command, env={"NEMOSERVE_CACHE": "/nowhere"}).stdout
            for each in json.loads(printed):
                if each["precision"] in ("bf16", "fp8", "fp8-weight-only"):
                    fit = " | ".join(str(each["tokens"] // length) for length in LENGTHS)
                    yield f"| {each['device']} | {each['precision']} | {kv} | {each['tokens']:,} | {fit} |"


def current(text: str) -> str:
    head, _, rest = text.partition(BEGIN)
    return head + BEGIN + table() + END + rest.partition(END)[2]


def test_the_sizes_are_those_of_the_program() -> None:
    assert current(PAGE.read_text()) == PAGE.read_text()


def commands(program: str) -> list[str]:
    """Of this page, the one on scale to zero, and the chart's README, without comments."""
    text = PAGE.read_text() + ZERO.read_text() + README.read_text()
    found = re.findall(rf"^\$ ({program} (?:.*\\\n)*.*)$", text, re.MULTILINE)
    return [shlex.join(shlex.split(each.replace("\\\n", " "), comments=True)) for each in found]


@pytest.mark.parametrize("helm", HELMS)
@pytest.mark.parametrize("command", [each for each in commands("helm") if " helm/nemoserve" in each])
def test_what_the_page_installs_is_rendered(helm: str, command: str) -> None:
    arguments = [each for each in shlex.split(command)[2:] if each not in ("--install", "--reset-then-reuse-values")]
    done = run(helm, "template", *[str(ROOT / each) if each.startswith("helm/") else each for each in arguments])
    assert done.returncode == 0, done.stderr
    assert objects(done.stdout)


def test_what_the_page_builds_is_built() -> None:
    [command] = commands("kubectl kustomize")
    assert run("kubectl", "kustomize", ROOT / shlex.split(command)[-1]).returncode == 0


def test_secrets_are_made_as_the_chart_reads_them(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text("[]\n")
    for command in commands("kubectl create secret"):
        arguments = [each.replace("keys.yaml", str(tmp_path / "keys.yaml")) for each in shlex.split(command)[1:]]
        done = run("kubectl", *arguments, "--dry-run=client", "--output=json")
        assert done.returncode == 0, done.stderr
        assert list(json.loads(done.stdout)["data"]) in (["token"], ["keys.yaml"])


def test_every_alert_has_its_line() -> None:
    [group] = one(rendered("scale-to-zero"), "PrometheusRule")["spec"]["groups"]
    assert re.findall(r"^\| `(Nemoserve\w+)`", PAGE.read_text(), re.MULTILINE) == [
        rule["alert"] for rule in group["rules"]
    ]


def test_files_and_targets_that_are_named_exist() -> None:
    text = PAGE.read_text()
    for name in re.findall(r"`(ci/[\w-]+\.yaml)`", text):
        assert (README.parent / name).exists()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`?make ([a-z-]+)", text)) <= set(targets)


if __name__ == "__main__":
    PAGE.write_text(current(PAGE.read_text()))
