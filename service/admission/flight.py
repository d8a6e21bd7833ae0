"""One request from its arrival to its end, as admission sees it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from service.admission.fair_queue import Ticket


@dataclass(slots=True, eq=False, kw_only=True)
class Flight(Ticket):
    """Attributes:
    deadline: see `service.generation.GenerationRequest`.
    slots: completions.
    may_block: they have a grammar or an adapter, and so may wait with the engine for something else than a row.
    waited: seconds from its arrival to its turn.
    used: tokens that its tenant's allowance was charged with.
    entering: its prompt is being encoded.
    accepted: it has joined, and was not refused.
    with_engine: completions, by index, that the engine has been handed and has not ended.
    started: it has had an event.
    returned: it has been with an engine that died.
    left: it has ended.
    """

    deadline: float | None = None
    slots: int = 1
    may_block: bool = False
    waited: float = 0.0
    used: float = 0.0
    entering: bool = True
    accepted: bool = False
    with_engine: set[int] = field(default_factory=set)
    started: bool = False
    returned: bool = False
    left: bool = False
    turn: asyncio.Future[None] | None = None

    def late(self, now: float) -> bool:
        return self.deadline is not None and now >= self.deadline
