"""docs/memory.md says what the commands print today. Run as a program, this writes the page anew."""

from __future__ import annotations

import re
from pathlib import Path

from click.testing import CliRunner

from engine.memory import parameter_count, weight_bytes
from engine.schemes import SCHEMES
from service.cli.main import main
from service.models.family import NEMO_12B

PAGE = Path(__file__).resolve().parents[2] / "docs" / "memory.md"


def current(text: str) -> str:
    """The page with every block replaced by what the command above it prints, and the table of weights."""
    blocks = re.sub(r"```console\n\$ nemoserve (.*)\n(?s:.*?)```", lambda found: printed(found[1]), text)
    head, begin, rest = blocks.partition("<!-- weights of mistral-nemo-12b-instruct -->\n")
    _, end, tail = rest.partition("<!-- end -->")
    return head + begin + weight_table() + end + tail


def printed(arguments: str) -> str:
    output = CliRunner().invoke(main, arguments.split(), env={"NEMOSERVE_CACHE": "/nowhere"}).stdout
    return f"```console\n$ nemoserve {arguments}\n{output}```"


def weight_table() -> str:
    rows = ["| `--precision` | projections | head | embedding | GB |", "|---|---|---|---|---|"]
    for name, scheme in SCHEMES.items():
        if name != "auto":
            projections = scheme.linear.value + (
                f"; gate, up of the inner layers: {scheme.gate_up.value}" if scheme.gate_up else ""
            )
            kept = (projections, scheme.head.value, scheme.embedding.value)
            rows.append(f"| `{name}` | {' | '.join(kept)} | {weight_bytes(NEMO_12B, scheme, 2) / 1e9:.2f} |")
    return "\n".join(rows) + "\n"


def test_the_page_is_what_the_commands_print() -> None:
    text = PAGE.read_text()
    assert text.count("```console") == 3
    assert "mistral-nemo-12b-instruct/h200-fp8-tp1" in text
    assert current(text) == text


def test_the_sums_of_the_page_are_those_of_the_model() -> None:
    text, model = PAGE.read_text(), NEMO_12B
    projections = (
        2 * model.hidden_size * (model.q_size + model.kv_size) + 3 * model.hidden_size * model.intermediate_size
    )
    ends, norms = model.vocab_size * model.hidden_size, (2 * model.num_layers + 1) * model.hidden_size
    assert model.num_layers * projections + 2 * ends + norms == parameter_count(model)
    for number in (parameter_count(model), projections, ends, norms):
        assert f"{number:,}" in text


if __name__ == "__main__":
    PAGE.write_text(current(PAGE.read_text()))
