"""The kernel benchmark on a model that takes milliseconds: what it counts and what it writes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from bench import kernels
from tests.compiled import compiled


def test_bytes_and_operations_are_those_of_the_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(1)
    monkeypatch.setitem(kernels.MODELS, "1b", kernels.Model(((128, 64), (64, 128)), 3, (640, 64)))
    monkeypatch.setattr(kernels, "READ_BYTES", 2**20)
    path = tmp_path / "kernels.json"
    arguments = ["--model", "1b", "--rows", "2,65", "--passes", "1", "--json", str(path)]

    done = CliRunner().invoke(kernels.main, arguments, catch_exceptions=False)

    assert done.exit_code == 0
    result = msgspec.json.decode(path.read_bytes(), type=kernels.Result)
    assert [(each.form, each.rows) for each in result.passes] == [(form, n) for form in kernels.FORMS for n in (2, 65)]
    layers, head = 3 * (128 * 64 + 64 * 128), 640 * 64
    for each in result.passes:
        weights = layers + (head if each.rows == 2 else 0)  # a head never sees 65 rows
        assert each.flops_per_second * each.seconds == pytest.approx(2 * each.rows * weights)
        if each.form == "bf16":
            assert each.bytes_per_second * each.seconds == pytest.approx(2 * weights)
        assert each.limit > 0
