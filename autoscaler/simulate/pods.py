"""What the simulated cluster keeps of a replica, and of a look at all of them. Times are seconds since the start."""

from __future__ import annotations

from dataclasses import dataclass

from autoscaler.fleet import Phase


@dataclass(eq=False)
class Pod:
    name: str
    created: float
    phase: Phase = Phase.PENDING
    node: float | None = None
    ready: float | None = None  # first
    gone: float | None = None
    slot: int | None = None  # its engine, while it is ready or drains
    reserved: bool = False  # a node is there or on its way
    unschedulable_since: float | None = None
    expected: float = 0.0  # to be ready then, while it starts
    draining_since: float = 0.0  # while it drains
    eta_factor: float = 1.0
    life: int = 0  # grows with each start: events of an earlier one mean nothing


@dataclass(frozen=True, slots=True)
class Look:
    """What the timeline keeps of one."""

    at: float
    desired: int
    ready: int
    billed: int
    queued: int
    running: int
