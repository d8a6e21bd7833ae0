"""bench.simulator: that engine and simulator get the same requests on clocks that agree, on a tiny model."""

from __future__ import annotations

import json
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from autoscaler.simulate import trace
from bench import simulator as program
from bench.simulator import Clock, engine_times
from engine.config import EngineConfig
from engine.parallel.leader import load_runner
from tests.tiny_models import write_hf


def test_the_clock_counts_work_and_what_it_is_put_forward_by() -> None:
    clock, began = Clock(), time.process_time()
    clock.wait_for(100.0)
    clock.wait_for(50.0)  # is over
    took = time.process_time() - began
    assert 100.0 <= clock() <= 100.1 + took


def test_an_engine_that_waits_for_a_request_takes_no_time(tmp_path: Path) -> None:
    config = EngineConfig(model_path=str(write_hf(tmp_path / "model")), device="cpu", threads=1, max_model_len=256)
    runner = load_runner(config, lambda phase, done: None)
    made = trace("two", [0.0, 5000.0], [30, 20], [4, 1])

    first, end, seconds = engine_times(runner, config, made)
    runner.close()

    assert np.all(first > made.arrival_s)
    assert end[0] > first[0]
    assert end[1] == first[1]
    assert end[1] - 5000.0 < seconds < 1000


def test_the_program_writes_what_it_shows(tmp_path: Path) -> None:
    model, path, curve = write_hf(tmp_path / "tiny"), tmp_path / "out.json", tmp_path / "costs.json"
    cost = {"base": 0.001, "per_prefill_token": 1e-5, "per_decode_row": 1e-5, "per_context_token": 0.0}
    sizes = {"max_batch_size": 4, "max_step_tokens": 64, "kv_tokens": 4096}
    curve.write_text(json.dumps({"step_cost": cost, "model": "tiny", "machine": "a test", **sizes}))
    short = ["--rates", "2,4", "--seconds", "3", "--input", "10", "--output", "3"]

    done = CliRunner().invoke(
        program.main,
        ["--model", str(model), "--curve", str(curve), "--json", str(path), *short],
        catch_exceptions=False,
    )

    assert done.exit_code == 0
    result = msgspec.json.decode(path.read_bytes(), type=program.Result)
    assert (result.model, result.curve, len(result.cases)) == ("tiny", "costs.json", 2)
    for case in result.cases:
        assert case.requests > 0
        assert 0 < case.simulated.ttft[0] <= case.simulated.ttft[2]
        assert case.simulated.ttft[0] == pytest.approx(0.001, rel=0.9)
        assert f"{case.ttft_ratio:.3f}" in done.output
    assert str(tmp_path) not in path.read_text()
