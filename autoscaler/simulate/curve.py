"""What a replica is, to the simulator: how long its steps take and how much it holds. Read from a file that is named in
every result, so that measured figures and arithmetic are never taken for one another.

The file is JSON: `step_cost` with the four coefficients of `autoscaler.fleet.StepCost`, `max_batch_size` (requests that
run at the same time), `max_step_tokens` (budget of a step), `kv_tokens` (that the KV pages hold), `model`, `machine`.
`bench.step_costs` writes such files from what the engine fits to its own steps; their other fields are not read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autoscaler.fleet import StepCost

ARITHMETIC = Path(__file__).parent / "curves" / "h100-arithmetic.json"
MEASURED = Path(__file__).parents[2] / "bench" / "results"  # in a checkout: step-costs-*.json, by `bench.step_costs`


@dataclass(frozen=True, slots=True)
class Curve:
    name: str  # of the file it is from
    model: str
    machine: str
    step_cost: StepCost
    max_batch_size: int
    max_step_tokens: int
    kv_tokens: int

    def __post_init__(self) -> None:
        cost = self.step_cost
        if cost.base <= 0:
            raise ValueError(f"{self.name}: step_cost.base is {cost.base}, and a step takes some time")
        if min(cost.per_prefill_token, cost.per_decode_row, cost.per_context_token) < 0:
            raise ValueError(f"{self.name}: step_cost has a negative coefficient")
        if not 1 <= self.max_batch_size < self.max_step_tokens:
            raise ValueError(
                f"{self.name}: max_batch_size is {self.max_batch_size}; it must be from 1 to less than "
                f"max_step_tokens, {self.max_step_tokens}, or a full batch would compute no prompt"
            )
        if self.kv_tokens < 2:
            raise ValueError(f"{self.name}: kv_tokens is {self.kv_tokens}, and the shortest request needs 2")

    def work_seconds(self, input_tokens: Any, cached_tokens: Any, output_tokens: Any) -> Any:
        """Time that requests take of a replica beyond the base of the steps that they share with others.

        w = B (in - cached) + out (C + D (in + out / 2)): a replica that gets W seconds of work per second spends the
        share W of its time on it, and the rest on bases, so that a step takes A / (1 - W) seconds.
        """
        cost = self.step_cost
        each_token = cost.per_decode_row + cost.per_context_token * (input_tokens + output_tokens / 2)
        return cost.per_prefill_token * (input_tokens - cached_tokens) + output_tokens * each_token

    def utilization(self, itl_seconds: float) -> float:
        """The most work per second that leaves the mean step at `itl_seconds`: u = 1 - A / itl; 0 if none does."""
        return float(np.clip(1 - self.step_cost.base / itl_seconds, 0, 1))


def read_curve(path: str | Path) -> Curve:
    """Raises ValueError that names the file and the field where the file is not one of these."""
    path = Path(path)
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    try:
        cost = StepCost(**{name: float(value) for name, value in data["step_cost"].items()})
        limits = {name: int(data[name]) for name in ("max_batch_size", "max_step_tokens", "kv_tokens")}
        return Curve(path.name, str(data["model"]), machine(data["machine"]), cost, **limits)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the figures of a replica: {error}") from error


def machine(value: Any) -> str:
    """In words: a result file of `bench` has a CPU and its cores, another one has the words."""
    return f"{value['cores']} cores of {value['cpu']}" if isinstance(value, dict) else str(value)


def default_curve() -> Curve:
    """The first measured one of the checkout, else arithmetic."""
    measured = sorted(MEASURED.glob("step-costs-*.json"))
    return read_curve(measured[0] if measured else ARITHMETIC)
