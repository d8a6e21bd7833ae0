"""Real text to measure tokenizers on: prose in a dozen languages and source code, from files that lie here anyway."""

from __future__ import annotations

import gzip
import json
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

CODE = "code"
MOST_CHARACTERS = 1_000_000  # of a body of source code; more change no third digit


@dataclass(frozen=True, slots=True)
class Text:
    """A body of text. `kind` is a language (ISO 639-1) or CODE."""

    kind: str
    source: str
    text: str


def read_texts(data: Path) -> list[Text]:
    """All texts.

    Args:
        data: folder with text/udhr.json.gz, text/debian-handbook.json.gz (both {language: text}) and
            text/HumanEval.jsonl.gz. Code comes as well from Python's standard library and from torch's C++ headers.

    Raises:
        FileNotFoundError: a file is not there.
    """
    problems = [json.loads(line) for line in _unpacked(data / "text" / "HumanEval.jsonl.gz").splitlines()]
    library = Path(sysconfig.get_path("stdlib"))
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    headers = Path(spec.origin).parent / "include" / "ATen"
    code = {
        "HumanEval": "\n".join(each["prompt"] + each["canonical_solution"] for each in problems),
        "Python library": _joined(library.glob("*.py")),
        "ATen C++": _joined(headers.glob("*.h")),
    }
    prose = {"UDHR": "udhr.json.gz", "handbook": "debian-handbook.json.gz"}
    return [
        *(Text(CODE, source, text) for source, text in code.items()),
        *(
            Text(language, source, text)
            for source, name in prose.items()
            for language, text in json.loads(_unpacked(data / "text" / name)).items()
        ),
    ]


def _unpacked(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode("utf-8")


def _joined(paths: Iterable[Path]) -> str:
    return "".join(path.read_text("utf-8") for path in sorted(paths))[:MOST_CHARACTERS]
