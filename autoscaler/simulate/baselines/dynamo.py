"""NVIDIA Dynamo's planner for aggregated (not split) engines: a floor from throughput, and one replica more or fewer
by estimated latency.

Sources, below `components/src/dynamo/planner/` of ai-dynamo/dynamo: `core/throughput_scaling.py` (`_throughput_agg`),
`core/load_scaling.py` (`_advance_load_agg`, `_agg_prefill_scaling`, `_agg_decode_scaling`), `core/perf_model/agg.py`,
`core/load/predictors.py`, `config/defaults.py`.

Where this differs. Upstream fits the time of a step to samples of steps; here it is given the costs that the engine
tells, which are better than a fit. Its default predictor is pmdarima's automatic ARIMA; here are the two others that
need no package, and `constant` (which a random walk, ARIMA(0,1,0), predicts as well) is the default. Upstream ships
load scaling switched off; here both are on, since that is the planner in full, and parameters switch either off. What
it promises is not its 500 ms and 50 ms but the target of the workload, as a user would set them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autoscaler.decision import Decision
from autoscaler.fleet import Load, Observation, Phase, StepCost
from autoscaler.settings import Settings
from autoscaler.simulate.baselines.signals import Flow, Flows, bounded, ready


@dataclass(frozen=True, slots=True)
class Parameters:
    throughput_scaling: bool = True
    load_scaling: bool = True
    throughput_interval_seconds: float = 180.0
    load_interval_seconds: float = 5.0
    down_sensitivity: float = 0.8  # of the target, that must hold with one replica fewer
    target_scale: float = 1.0  # of what the workload promises, that is planned with
    predictor: str = "constant"  # or "kalman"
    kalman_level_noise: float = 1.0
    kalman_trend_noise: float = 0.1
    kalman_measurement_noise: float = 10.0
    kalman_min_points: int = 5

    def __post_init__(self) -> None:
        if self.predictor not in ("constant", "kalman"):
            raise ValueError(f"predictor: {self.predictor!r} is neither constant nor kalman")
        for name in ("throughput_interval_seconds", "load_interval_seconds", "target_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not more than 0")


class Kalman:
    """`KalmanPredictor`: a level and its trend, x' = x + v. Both noises of the process are those of one step."""

    def __init__(self, level_noise: float, trend_noise: float, measurement_noise: float) -> None:
        self._q, self._r = (level_noise, trend_noise), measurement_noise
        self._level, self._trend = 0.0, 0.0
        self._p = [1000.0, 0.0, 1000.0]  # variance of the level, covariance, variance of the trend
        self._started = False

    def add(self, value: float) -> None:
        if not self._started:
            self._level, self._started = value, True
            return
        self._predict()
        level, both, trend = self._p
        gain, trend_gain = level / (level + self._r), both / (level + self._r)
        error = value - self._level
        self._level += gain * error
        self._trend += trend_gain * error
        self._p = [(1 - gain) * level, (1 - gain) * both, trend - trend_gain * both]

    def _predict(self) -> None:
        level, both, trend = self._p
        self._level += self._trend
        self._p = [level + 2 * both + trend + self._q[0], both + trend, trend + self._q[1]]

    def next(self) -> float:
        return self._level + self._trend


@dataclass(frozen=True, slots=True)
class Mix:
    """What requests are like, on average."""

    requests: float
    prompt_tokens: float  # of each
    output_tokens: float
    hit_rate: float = 0.0  # share of prompt tokens that the prefix cache has

    @classmethod
    def of(cls, flow: Flow) -> Mix:
        return cls(float(flow.arrived_requests), flow.mean_input, flow.mean_output, flow.hit_rate)


def held_tokens(load: Load) -> float:
    return float(load.kv_pages_used * load.kv_page_tokens)


@dataclass(frozen=True, slots=True)
class Engine:
    """`AggRegressionModel`: seconds of a step by tokens of prompts and tokens in the cache."""

    cost: StepCost
    step_tokens: int  # budget of a step
    sequences: int
    kv_tokens: int
    mean_context: float  # tokens in the cache per running request

    @classmethod
    def of(cls, loads: Sequence[Load], mix: Mix) -> Engine | None:
        """None where no replica tells what its steps cost."""
        known = [load for load in loads if load.step_cost != StepCost() and load.max_step_tokens]
        if not known:
            return None
        held, running = sum(map(held_tokens, known)), sum(load.running_requests for load in known)
        context = held / running if running else mix.prompt_tokens + mix.output_tokens / 2
        first = known[0]
        kv = first.kv_pages_total * first.kv_page_tokens
        return cls(first.step_cost, first.max_step_tokens, first.capacity or kv, kv, max(context, 1.0))

    def step_seconds(self, prefill: float, kv: float) -> float:
        cost = self.cost
        rows = kv / self.mean_context
        return max(
            1e-6,
            cost.base + cost.per_prefill_token * prefill + cost.per_decode_row * rows + cost.per_context_token * kv,
        )

    def ttft(self, queued: float, kv: float, mix: Mix) -> float:
        """`estimate_next_ttft`: the chunks of what is queued and of one more prompt."""
        remaining = (queued + mix.prompt_tokens) * (1.0 - mix.hit_rate)
        whole, rest = divmod(remaining, self.step_tokens)
        seconds = whole * self.step_seconds(self.step_tokens, kv)
        return seconds + (self.step_seconds(rest, kv) if rest > 0 else 0.0)

    def best_rate(self, mix: Mix, ttft: float, itl: float) -> float:
        """`find_best_engine_agg_rps`: requests per second of the largest batch that keeps both promises; 0: unknown."""
        isl, osl = mix.prompt_tokens, mix.output_tokens
        if isl <= 0 or osl <= 0:
            return 0.0
        context = isl + osl / 2
        most = min(int(self.kv_tokens / context), self.sequences, self.step_tokens - 1)
        most = max(1, min(most, int(osl * self.step_tokens / (isl + osl))))
        best = 0.0
        for batch in range(1, most + 1):
            kv = batch * context
            prefill = min(batch * isl * (1.0 - mix.hit_rate) / max(1.0, osl), self.step_tokens)
            step = self.step_seconds(prefill, kv)
            late = step > itl or self.ttft(prefill, kv, mix) > ttft
            if not late or batch == 1:
                best = batch / (osl * step)
            if late:
                break
        return best


class Dynamo:
    def __init__(self, parameters: Parameters, settings: Settings) -> None:
        self._parameters, self._settings = parameters, settings
        self._ttft = settings.target.ttft_seconds * parameters.target_scale
        self._itl = settings.target.itl_seconds * parameters.target_scale
        self._flows = Flows()
        self._flow = Flow()  # of the interval that goes on
        self._mix: Mix | None = None  # of the interval before
        self._began: float | None = None
        self._points = 0
        noises = parameters.kalman_level_noise, parameters.kalman_trend_noise, parameters.kalman_measurement_noise
        self._predictors = [Kalman(*noises) for _ in range(3)]
        self._floor = 0

    @property
    def interval_seconds(self) -> float:
        return self._parameters.load_interval_seconds

    def decide(self, observation: Observation) -> Decision:
        chosen, at = self._parameters, observation.at
        loads = [each.load for each in ready(observation) if each.load is not None]
        flow = self._flows.since_last(observation)
        if self._began is None:
            self._began = at  # what was before has no time
        else:
            self._flow += flow
        if chosen.throughput_scaling and (elapsed := at - self._began) >= chosen.throughput_interval_seconds:
            self._throughput(loads, elapsed)
            self._flow, self._began = Flow(), at
        if not chosen.load_scaling:
            return bounded(self._floor or observation.desired, self._settings, f"throughput needs {self._floor}")
        mix = self._mix or Mix.of(self._flow)
        engine = Engine.of(loads, mix)
        changing = observation.in_phase(Phase.PENDING, Phase.STARTING, Phase.LOADING, Phase.DRAINING)
        if engine is None or changing or len(loads) != observation.desired:
            return bounded(observation.desired, self._settings, "holds: scaling is in progress, or nothing is known")
        step = self._load(engine, loads, mix)
        return bounded(max(len(loads) + step, self._floor), self._settings, f"load {step:+d}, floor {self._floor}")

    def _throughput(self, loads: list[Load], elapsed: float) -> None:
        """Sets the floor to what the demand of the next interval needs, where that is known."""
        seen = Mix.of(self._flow)
        if not seen.requests or not seen.output_tokens:
            return
        self._mix = seen
        self._points += 1
        values = (seen.requests, seen.prompt_tokens, seen.output_tokens)
        for predictor, value in zip(self._predictors, values, strict=True):
            predictor.add(value)
        expected = seen
        if self._parameters.predictor == "kalman" and self._points >= self._parameters.kalman_min_points:
            requests, prompt, output = (max(0.0, each.next()) for each in self._predictors)
            expected = Mix(requests, prompt, output, seen.hit_rate)
        engine = Engine.of(loads, expected)
        rate = engine.best_rate(expected, self._ttft, self._itl) if engine is not None else 0.0
        if rate > 0:
            self._floor = math.ceil(expected.requests / elapsed / rate)

    def _load(self, engine: Engine, loads: list[Load], mix: Mix) -> int:
        """+1, 0 or -1, by the prompts that wait and by those that are answered: either may ask for one more, both must
        allow one fewer."""
        count = len(loads)
        prefills = [engine.ttft(load.queued_tokens, held_tokens(load), mix) for load in loads]
        decodes = [self._itl_after(engine, held_tokens(load), mix) for load in loads]
        if all(each > self._ttft for each in prefills) or all(each > self._itl for each in decodes):
            return 1
        more = count / (count - 1) if count > 1 else 0.0
        return -1 if count > 1 and all(self._fits(engine, load, more, mix) for load in loads) else 0

    def _itl_after(self, engine: Engine, kv: float, mix: Mix) -> float:
        """`estimate_next_itl`: a step that carries its mean share of prompts and one request more."""
        prefill = mix.prompt_tokens * (1.0 - mix.hit_rate) * kv / engine.mean_context / max(1.0, mix.output_tokens)
        return engine.step_seconds(min(prefill, engine.step_tokens), kv + engine.mean_context)

    def _fits(self, engine: Engine, load: Load, more: float, mix: Mix) -> bool:
        """Whether a replica that takes its share of one that goes still keeps the promises with a margin."""
        margin, kv = self._parameters.down_sensitivity, held_tokens(load) * more
        own = engine.ttft(0.0, kv, mix)
        budget = (self._ttft - own) * margin
        if budget <= 0 or engine.ttft(load.queued_tokens * more, kv, mix) - own >= budget:
            return False
        combined = kv + load.queued_tokens * more
        return combined < engine.kv_tokens and self._itl_after(engine, combined, mix) < self._itl * margin
