"""THE use case: prompt or chat -> tokens -> engine -> text deltas, usage, finish reason.

Every protocol adapter builds one GenerationRequest, calls `Generator.generate`, and translates what it yields:
one Started, Deltas, one Finished per index. Adapters call nothing below this module.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine import FinishReason, SamplingParams, TokenLogprob
from service.text.chat import Conversation


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One request in protocol-neutral form.

    Attributes:
        prompt: raw text, token ids, or a conversation.
        sampling: engine-level parameters, not yet validated.
        n: independent completions; they share nothing but the prompt.
        stop: strings that end a completion; the match is cut off unless include_stop.
    """

    request_id: str
    prompt: str | list[int] | Conversation
    sampling: SamplingParams = SamplingParams()
    n: int = 1
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The first token is ready. Everything before this point can be retried."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    queue_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """New text of completion `index`: whole characters; empty while a character or stop string is undecided."""

    index: int
    text: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Completion `index` has ended. `matched_stop` is the stop string or stop token id that ended it; None for end of
    sequence. Times are seconds since the request arrived."""

    index: int
    reason: FinishReason
    usage: Usage
    matched_stop: str | int | None = None
    error: str | None = None
    queued_seconds: float = 0.0
    first_token_seconds: float = 0.0
    finished_seconds: float = 0.0


GenerationEvent = Started | Delta | Finished
