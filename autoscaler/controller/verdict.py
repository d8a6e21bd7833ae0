"""Whether what the policy decides is done: by whom else the workload is scaled, and what its owner has set. Pure.

The first that holds: another scaler has the workload ── a pin by hand ── paused, as it was scaled to 0 by hand ──
dry run ── the policy's word, within the limits of the spec.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from autoscaler.controller.status import Condition, Is
from autoscaler.decision import Decision, Limit
from autoscaler.resource import Spec

LIMITS = {
    Limit.MIN_REPLICAS: "there are no fewer than minReplicas, or than a schedule asks for",
    Limit.MAX_REPLICAS: "load asks for more than maxReplicas",
    Limit.RATE: "maxStep in periodSeconds is reached",
    Limit.STABILIZING: "fewer would do, and not for long enough yet",
    Limit.NO_NODES: "no node has room for a replica that is asked for",
    Limit.BLIND: "replicas do not say what they do",
}
WARNINGS = (Limit.MAX_REPLICAS, Limit.NO_NODES)  # more is needed than there may be, or can be


@dataclass(frozen=True, slots=True)
class Verdict:
    """Attributes:
    acts: whether the workload is changed.
    spare: of those desired, the ones beside what was decided on.
    """

    desired: int
    reason: str
    acts: bool
    active: Condition
    limited: Condition
    spare: int = 0


def judge(
    spec: Spec, asked: int, decision: Decision, rival: str | None, *, zero_is_ours: bool = False, spare: int = 0
) -> Verdict:
    """
    Args:
        asked: replicas that the workload is asked for.
        rival: who else scales it.
        zero_is_ours: that it is asked for none is by the resource's own former word.
        spare: replicas beside those that were decided on, as some fail.
    """
    settings = spec.settings
    if rival is not None:
        return _held(decision.desired, "OtherScaler", f"{rival} scales {spec.target} too: delete one of the two")
    if spec.pin is not None:
        desired = min(spec.pin, settings.max_replicas)
        reason = f"pinned to {desired} by spec.replicas; load alone would have {decision.desired}"
        limited = _limited(Limit.MAX_REPLICAS if desired < spec.pin else None)
        return Verdict(desired, reason, not spec.dry_run, _active(Is.FALSE, "Pinned", reason), limited)
    zero_is_off = asked == 0 and not settings.scale_to_zero.enabled
    if zero_is_off and not zero_is_ours:
        return _held(0, "Paused", f"{spec.target} was scaled to 0 by hand; scale it to 1 or more to go on")
    lowest = 0 if settings.scale_to_zero.enabled else settings.min_replicas
    desired = min(max(decision.desired, lowest), settings.max_replicas)
    reason = "scale to zero is off" if zero_is_off else decision.reason
    spare = min(spare, settings.max_replicas - desired) if desired else 0
    if spare:
        desired += spare
        reason += f"; {desired} with one for what fails"
    if spec.dry_run:
        active = _active(Is.FALSE, "DryRun", f"{desired} replicas would be right; spec.dryRun is true")
    else:
        active = _active(Is.TRUE, "Deciding", "replicas follow load")
    return Verdict(desired, reason, not spec.dry_run, active, _limited(decision.limit), spare)


def held_back(verdict: Verdict, wanted: int) -> Verdict:
    """While the workload rolls out: no fewer replicas than now, whoever wants that."""
    if not verdict.acts or verdict.desired >= wanted:
        return verdict
    reason = f"{verdict.reason}; still {wanted}: none goes while a rollout is under way"
    message = f"{verdict.desired} would do; a Deployment that rolls out does not choose whom it ends"
    limited = Condition("ScalingLimited", Is.TRUE, "RolloutUnderWay", message)
    return replace(verdict, desired=wanted, reason=reason, limited=limited)


def _held(desired: int, word: str, message: str) -> Verdict:
    return Verdict(desired, message, False, _active(Is.FALSE, word, message, warning=True), _limited(None))


def _active(status: Is, word: str, message: str, *, warning: bool = False) -> Condition:
    return Condition("ScalingActive", status, word, message, warning)


def _limited(limit: Limit | None) -> Condition:
    if limit is None:
        return Condition("ScalingLimited", Is.FALSE, "WithinLimits", "as many as load asks for")
    return Condition("ScalingLimited", Is.TRUE, limit.value, LIMITS[limit], warning=limit in WARNINGS)
