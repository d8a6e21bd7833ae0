"""The words between scheduler and runner: one StepPlan down, one StepResult up. Torch-free.

A request owns one *row* from admission to its end: an index into permanent device state (block table, sampling
parameters, token counts). Plans name rows, not requests, and carry only what changed since the last step.

    scheduler ──StepPlan{released, fills, admitted, work}──► runner ──StepResult{sampled}──► scheduler

A step may be planned while the one before it runs. The token that a row is about to get is not known then, and its
place in the plan is taken by LAST_SAMPLED: the device has kept the token and puts it there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from engine.request import SamplingParams, TokenLogprob

LAST_SAMPLED = -1  # in `RowWork.token_ids`: the token that the row has sampled last, whatever it is

Masks = Callable[[], Mapping[int, bytes]]
"""What the rows of a step that have grammars may choose, by row. It is asked for once, when the logits are on their
way: it may wait for the step before, and takes time that the device has. For each of a row's choices, 1 + drafts of
them side by side, there is a mask: bit i % 8 of byte i // 8 says whether it may be token i. All masks have one length,
with room for each token of the vocabulary."""


@dataclass(frozen=True, slots=True)
class RowInit:
    """A request takes a row. After a pre-emption it comes again, with the tokens that it had generated.

    Attributes:
        seed: basis of the row's random stream; together with a token's position it fixes the draw.
        prompt_token_ids, output_token_ids: what penalties and min_tokens look at.
        adapter: slot of its LoRA adapter, None = the model as it is.
    """

    row: int
    sampling: SamplingParams
    seed: int
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    adapter: int | None = None


@dataclass(frozen=True, slots=True)
class Targets:
    """Tokens of a prompt whose logprobs are wanted: they stand at positions start .. start + len(token_ids) - 1.

    Attributes:
        top: how many of the likeliest tokens to name beside each.
    """

    start: int
    token_ids: list[int]
    top: int


@dataclass(frozen=True, slots=True)
class RowWork:
    """Tokens to compute for one row: positions start .. start + len(token_ids) - 1.

    Attributes:
        token_ids: known ones; or LAST_SAMPLED alone, while the step that samples it is still in flight.
        new_pages: KV pages appended to the row's block table before this step. With the first work of a row that starts
            behind position 0 come the pages of what lies before: they are full, or another row fills them in this step.
        sample: the last of token_ids, but for the drafts, is the last known token, so its logits choose the next one.
        drafts: how many of token_ids, the last ones, are guesses at what follows the last known token. Each one's
            logits choose a token too, which counts as far as the guesses before it were right. Only where `sample`,
            and never of a row with penalties: its logits depend on the tokens that were chosen before.
        targets: each stands one behind one of token_ids, whose logits say how likely it was.
    """

    row: int
    start: int
    token_ids: list[int]
    new_pages: list[int]
    sample: bool
    targets: Targets | None = None
    drafts: int = 0


@dataclass(frozen=True, slots=True)
class SlotFill:
    """The matrices of adapter number `adapter` go into a slot, whatever was there."""

    slot: int
    adapter: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All that one step does. `released` rows are free, and `fills` done, before `admitted` take theirs."""

    work: list[RowWork]
    admitted: list[RowInit] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    fills: list[SlotFill] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(work.token_ids) for work in self.work)

    @property
    def is_empty(self) -> bool:
        """There is nothing to do for anybody."""
        return not (self.work or self.admitted or self.released or self.fills)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The next token of one row; `failed` says why there is none (logits that are not numbers)."""

    row: int
    token_id: int
    logprob: TokenLogprob | None = None
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step computed.

    Attributes:
        sampled: the next tokens of each RowWork with `sample`, side by side in their order: one, and one more for each
            draft that was right, up to the first that was not.
        targets: by row, one for each of its targets, in order.
        model_seconds: in the decoder, up to the logits. Of a device that works behind the host's back: in launching it.
    """

    sampled: list[SampledToken]
    targets: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    model_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Committed:
    """What a step computed, in numbers.

    Attributes:
        tokens: all of them; one of each row that decodes, and its drafts, among them.
        decode_rows: rows that had one known token to compute.
        context_tokens: those that the rows attended to, their own included.
    """

    tokens: int = 0
    decode_rows: int = 0
    context_tokens: int = 0
