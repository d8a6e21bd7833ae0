"""What admission tells of itself, as plain data."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class Refusal(enum.StrEnum):
    """Why a request was not accepted, or was ended without having been with the engine."""

    QUEUE_FULL = "queue_full"
    QUEUE_TOKENS = "queue_tokens"
    TENANT_QUEUE = "tenant_queue"
    TENANT_TOKENS = "tenant_tokens"
    DEADLINE = "deadline"  # it could not be met
    DEADLINE_IN_QUEUE = "deadline_in_queue"  # it passed


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionStats:
    """Gauges as of now, and counters from the start.

    Attributes:
        queued, queued_tokens: accepted requests that the engine has not been handed, and the tokens of their prompts.
        oldest_queued_seconds: age of the oldest of them.
        handed: completions that the engine has been handed and has not ended.
        arrived, arrived_tokens: requests that were accepted, each once, and the tokens of their prompts.
        finished: of those, whatever ended them.
        refused: requests by reason; every reason is there.
        expired: ended by their deadline after they had begun.
        slow_readers: ended because nobody took their events.
    """

    queued: int = 0
    queued_tokens: int = 0
    oldest_queued_seconds: float = 0.0
    handed: int = 0
    arrived: int = 0
    arrived_tokens: int = 0
    finished: int = 0
    refused: Mapping[Refusal, int] = field(default_factory=dict)
    expired: int = 0
    slow_readers: int = 0
