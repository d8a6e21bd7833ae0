"""Real text to measure on: prose in a dozen languages and source code, from files that lie here anyway."""

from __future__ import annotations

import gzip
import json
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

HANDBOOK, RIGHTS, PROBLEMS = "debian-handbook.json.gz", "udhr.json.gz", "HumanEval.jsonl.gz"
CODE = "code"
MOST_CHARACTERS = 1_000_000  # of a body of source code; more change no third digit


@dataclass(frozen=True, slots=True)
class Text:
    """A body of text. `kind` is a language (ISO 639-1) or CODE."""

    kind: str
    source: str
    text: str


def languages(path: Path) -> dict[str, str]:
    """One text in many languages: HANDBOOK, or RIGHTS. Raises OSError for a file that cannot be read."""
    found: dict[str, str] = json.loads(_unpacked(path))
    return found


def solutions(folder: Path) -> list[str]:
    """HumanEval's problems, each with its solution. Raises OSError for a file that cannot be read."""
    problems = map(json.loads, _unpacked(folder / PROBLEMS).splitlines())
    return [problem["prompt"] + problem["canonical_solution"] for problem in problems]


def read_texts(folder: Path) -> list[Text]:
    """All texts, to measure tokenizers on.

    Args:
        folder: has HANDBOOK, RIGHTS and PROBLEMS. Code comes as well from Python's standard library and from torch's
            C++ headers.

    Raises:
        FileNotFoundError: a file is not there.
    """
    library = Path(sysconfig.get_path("stdlib"))
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    headers = Path(spec.origin).parent / "include" / "ATen"
    code = {
        "HumanEval": "\n".join(solutions(folder)),
        "Python library": _joined(library.glob("*.py")),
        "ATen C++": _joined(headers.glob("*.h")),
    }
    prose = {"UDHR": RIGHTS, "handbook": HANDBOOK}
    return [
        *(Text(CODE, source, text) for source, text in code.items()),
        *(
            Text(language, source, text)
            for source, name in prose.items()
            for language, text in languages(folder / name).items()
        ),
    ]


def _unpacked(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode("utf-8")


def _joined(paths: Iterable[Path]) -> str:
    return "".join(path.read_text("utf-8") for path in sorted(paths))[:MOST_CHARACTERS]
