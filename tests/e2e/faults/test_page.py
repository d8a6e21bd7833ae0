"""docs/reliability.md names the tests that prove each of its rows: they are there, and all of this suite are named."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
NAMED = set(re.findall(r"`([\w/]+\.py)::(test_\w+)`", PAGE))


def names_in(file: Path) -> set[str]:
    nodes = ast.parse(file.read_text()).body
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {node.name for node in functions if node.name.startswith("test_")}


def test_every_proof_that_the_page_names_exists() -> None:
    gone = {(file, name) for file, name in NAMED if name not in names_in(ROOT / "tests" / file)}
    assert gone == set()
    assert len(NAMED) > 50


def test_every_fault_has_a_proof() -> None:
    """And every test of this suite its fault."""
    rows = re.findall(r"^### (.+?)\n(.*?)(?=^##)", PAGE + "\n##", re.M | re.S)
    assert len(rows) >= 15
    assert [fault for fault, text in rows if "::test_" not in text] == []
    own = {name for file in Path(__file__).parent.glob("test_*.py") for name in names_in(file)} - names_in(
        Path(__file__)
    )
    assert own - {name for _, name in NAMED} == set()
