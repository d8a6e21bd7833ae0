"""The words between scheduler and runner: one StepPlan down, one StepResult up. Torch-free.

A request owns one *row* from admission to its end: an index into permanent device state (block table, sampling
parameters, token counts). Plans name rows, not requests, and carry only what changed since the last step.

    scheduler ──StepPlan{released, admitted, work}──► runner ──StepResult{sampled}──► scheduler
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.request import SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class RowInit:
    """A request takes a row. After a pre-emption it comes again, with the tokens that it had generated.

    Attributes:
        seed: basis of the row's random stream; together with a token's position it fixes the draw.
        prompt_token_ids, output_token_ids: what penalties and min_tokens look at.
    """

    row: int
    sampling: SamplingParams
    seed: int
    prompt_token_ids: list[int]
    output_token_ids: list[int]


@dataclass(frozen=True, slots=True)
class RowWork:
    """Tokens to compute for one row: positions start .. start + len(token_ids) - 1.

    Attributes:
        new_pages: KV pages appended to the row's block table before this step.
        sample: the last of token_ids is the last known token, so its logits choose the next one.
    """

    row: int
    start: int
    token_ids: list[int]
    new_pages: list[int]
    sample: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All that one step does. `released` rows are free before `admitted` take theirs."""

    work: list[RowWork]
    admitted: list[RowInit] = field(default_factory=list)
    released: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(work.token_ids) for work in self.work)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The next token of one row; `failed` says why there is none (logits that are not numbers)."""

    row: int
    token_id: int
    logprob: TokenLogprob | None = None
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """One SampledToken for each RowWork with `sample`, in the order of the plan."""

    sampled: list[SampledToken]
