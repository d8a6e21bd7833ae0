"""What a simulated cluster is like, and what its requests were promised. Durations are seconds."""

from __future__ import annotations

from dataclasses import dataclass

from autoscaler.simulate.curve import Curve

GPU_PREFILL_SECONDS = 3e-5  # of a prompt token, for a 12B model in FP8 on an H100: arithmetic, as in curves/


@dataclass(frozen=True, slots=True)
class Slo:
    """A request that is later with either, or is lost, is a violation."""

    ttft_seconds: float = 2.0  # from arrival to first token
    itl_seconds: float = 0.06  # mean between two tokens of one request

    @classmethod
    def suited_to(cls, curve: Curve) -> Slo:
        """The above where a replica computes a prompt token within 30 µs; as many times longer as it takes longer.

        A fleet of CPUs cannot keep the promise of one of GPUs, however many there are.
        """
        slowness = max(curve.step_cost.per_prefill_token / GPU_PREFILL_SECONDS, 1.0)
        return cls(cls().ttft_seconds * slowness, cls().itl_seconds * slowness)


@dataclass(frozen=True, slots=True)
class WorldOptions:
    initial_replicas: int = 1  # ready when the trace starts: every policy takes over the same fleet
    min_replicas: int = 1
    max_replicas: int = 64
    cold_start_seconds: float = 120.0  # median from having a node to ready
    cold_start_sigma: float = 0.15  # of its logarithm
    loading_share: float = 0.7  # of a cold start: the server answers, and says how long it still needs
    node_delay_seconds: float = 0.0  # median from being created to having a node; of the same spread
    provisioning_failure: float = 0.0  # share of cold starts that fail at their end, and begin anew
    mtbf_seconds: float | None = None  # mean time that a ready replica lives; None: for ever
    retry: bool = True  # what a replica loses goes to another one; False: it is lost
    drain_seconds: float = 120.0  # that a victim has for what it accepted; what is left then is lost or retried
    victims: str = "idlest"  # of the ready ones; or "newest", or "random"
    schedulable: int | None = None  # replicas that nodes have room for, draining ones included; None: any
    metric_lag_seconds: float = 0.0  # age of the loads that a policy sees
    sample_loss: float = 0.0  # share of loads that do not come; a policy sees the ones before
    step_cost_error: float = 1.0  # factor on the costs that replicas report
    # Replicas that a request chooses the least loaded of, at random; None: all of up to 32, else 4
    dispatch_choices: int | None = None
    warmup_seconds: float | None = None  # not scored; None: 300, or a cold start and 120 where that is longer
    tail_seconds: float = 600.0  # that requests have after the last arrival; the fleet stays as it is

    def __post_init__(self) -> None:
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1:
            raise ValueError(f"replicas from {self.min_replicas} to {self.max_replicas}: not a range")
        if not 0 <= self.initial_replicas <= self.max_replicas:
            raise ValueError(f"initial_replicas is {self.initial_replicas}, and max_replicas {self.max_replicas}")
        for name in ("provisioning_failure", "sample_loss"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to below 1")
        if self.mtbf_seconds is not None and self.mtbf_seconds <= 0:
            raise ValueError(f"mtbf_seconds is {self.mtbf_seconds}; it must be above 0")
        if self.dispatch_choices is not None and self.dispatch_choices < 1:
            raise ValueError(f"dispatch_choices is {self.dispatch_choices}; it must be at least 1")
        if self.victims not in ("idlest", "newest", "random"):
            raise ValueError(f"victims is {self.victims!r}; it must be idlest, newest or random")
        delays = self.node_delay_seconds, self.metric_lag_seconds, self.drain_seconds
        if self.cold_start_seconds <= 0 or min(delays) < 0:
            raise ValueError("cold_start_seconds must be above 0, and no delay below it")

    @property
    def warmup(self) -> float:
        if self.warmup_seconds is not None:
            return self.warmup_seconds
        return max(300.0, self.cold_start_seconds + self.node_delay_seconds + 120.0)
