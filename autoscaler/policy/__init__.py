"""How many replicas, and why: the policy of the operator."""

from autoscaler.policy.policy import QueuePolicy

__all__ = ["QueuePolicy"]
