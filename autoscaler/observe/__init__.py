"""What the replicas of a workload say of themselves, and what the cluster says of those that say nothing.

pods ─► servers ─┬─ GetLoad ───► answers ─┬─► observer ─► fleet.Replica of each
                 └─ /metrics ──► text ────┘     (memory of those that are silent now)

A replica is a stranger: its answers are bounded in size and time, and one in which a number makes no sense is none.
"""

from autoscaler.observe.observer import Observer
from autoscaler.observe.secrets import Secrets

__all__ = ["Observer", "Secrets"]
