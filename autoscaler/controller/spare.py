"""One replica more than load needs while some fail: a sick pod or node costs no capacity. Pure, with a memory.

It is one however many fail, and only where one of the same template serves or has served: a fleet in which whatever is
made fails, as after a bad image, does not grow. What was added is kept apart from what was decided, so that a policy
never sees it: one that took it for its own would learn a larger fleet each time a replica goes back and forth.
"""

from __future__ import annotations

from autoscaler.controller.drain import Scene
from autoscaler.controller.verdict import Verdict
from autoscaler.fleet import Phase, Replica

# That a replica must have failed: what ended for the first or second time is started anew within 10 and 20 s.
SICK_SECONDS = 30.0
# That the spare one stays after the last failure: a kubelet pauses up to 300 s, and the start itself takes its time.
HEALTHY_SECONDS = 600.0


class Spare:
    """Of one workload, by one process.

    Attributes:
        included: replicas that the workload is asked for beside those that were decided on.
        due: the same, as it should be.
    """

    def __init__(self) -> None:
        self.included = self.due = 0
        self._failed: dict[str, float] = {}  # by name, since when
        self._sick_at = 0.0
        self._of: dict[int, int] | None = None  # how many are included, by how many are wanted in all

    def see(self, scene: Scene, now: float, told: int | None) -> None:
        """
        Args:
            now: seconds that never jump.
            told: how many the status says are included, as whoever led before has left it. None: it does not say; then
                what fails is taken to be made up for.
        """
        failed = [each.name for each in scene.replicas if each.phase is Phase.FAILED]
        if self._of is None:
            self._of, self._sick_at = {scene.wanted: int(bool(failed)) if told is None else told}, now
        self._failed = {name: self._failed.get(name, now) for name in failed}
        if sick := any(now - since >= SICK_SECONDS for since in self._failed.values()):
            self._sick_at = now
        makes_up = sick and not scene.mixed and any(map(_works, scene.replicas))
        self.included = min(self._of.get(scene.wanted, 0), max(0, scene.wanted - 1))
        stays = scene.mixed or now - self._sick_at < HEALTHY_SECONDS
        self.due = int(makes_up or (self.included > 0 and stays))

    def note(self, before: int, verdict: Verdict) -> None:
        """So many were wanted in all: they are still, if what is about to be done fails."""
        self._of = {before: self.included}
        if verdict.acts:
            self._of[verdict.desired] = self.included = verdict.spare


def _works(replica: Replica) -> bool:
    """It serves, or was seen to; `ready_at` is its creation where nobody saw that."""
    return replica.phase is Phase.READY or (replica.ready_at is not None and replica.ready_at > replica.created_at)
