"""How far one completion has come in its grammar, and where it ends.

How texts end is decided here. llguidance knows one end, an id behind the vocabulary that no model has; where it allows
that, the request's own ends may come: the model's end of sequence, and its stop tokens. They come nowhere else. Where
nothing else can come, the completion is over, and needs no token that says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llguidance import LLMatcher

from engine.grammar.language import DEAD_END, one_line

FIELD = "response_format"  # what users call a grammar


class Matcher:
    """How far one completion has come in its grammar.

    Attributes:
        limit: how many tokens the completion has at most; None = nothing has ended it yet.
        error: why there can be no more than `limit`; None = it is complete.
    """

    def __init__(self, start: LLMatcher, stops: Iterable[int], min_tokens: int) -> None:
        """
        Args:
            start: at the beginning of the grammar; it is left there.
            stops: tokens that end the text, where the grammar lets it end and it has `min_tokens`.
        """
        self.limit: int | None = None
        self.error: str | None = None
        self.core = start.deep_copy()
        self._stops = frozenset(stops)
        self._min_tokens = min_tokens
        self._count = 0

    def follow(self, position: int, token: int) -> None:
        """Token number `position` of the completion, counted from 0, is `token`. To say so again changes nothing."""
        if position < self._count or self.limit is not None:
            return
        assert position == self._count, f"token {position} after {self._count}"
        accepting = self.core.is_accepting()
        if token in self._stops or token < 0 or not self.core.consume_token(token):
            self.limit, self.error = position, None if accepting and token >= 0 else self._reason()
            return
        self._count += 1
        if self.core.is_stopped():
            self.limit = self._count

    def fitting(self, drafts: list[int]) -> list[int]:
        """The first of the drafts, as many as can come next."""
        if self.limit is not None:
            return []
        end = next((at for at, token in enumerate(drafts) if token in self._stops), len(drafts))
        return drafts[: self.core.validate_tokens(drafts[:end])]

    def masks_behind(self, drafts: Sequence[int], masks: memoryview, width: int) -> None:
        """Write the masks of the next token and of those behind the drafts, as far as these can come. A copy makes
        them: drafts may lead to where nothing follows, and need not come.

        Args:
            masks: full of ones.
            width: bytes of a mask.
        """
        ahead = self.core.deep_copy()
        for number in range(1 + len(drafts)):
            mask = ahead.compute_bitmask()
            if ahead.is_error():
                if number == 0:
                    self.core.compute_bitmask()  # the error is its own
                return
            masks[number * width : (number + 1) * width] = mask
            if number == len(drafts) or not ahead.try_consume_tokens([drafts[number]]):
                return

    def finish_masks(self, masks: memoryview, width: int, end: int) -> None:
        """Set the bits of the ends in the next masks, which llguidance has written.

        A mask that allows nothing else is filled: whatever is chosen then, `follow` finds the end, or the error.

        Args:
            width: bytes of a mask.
            end: bit of llguidance's own end.
        """
        if self.core.is_error():
            masks[:] = b"\xff" * len(masks)
            return
        for number in range(len(masks) // width):
            mask = masks[number * width : (number + 1) * width]
            may_end = mask[end >> 3] >> (end & 7) & 1 and self._count + number >= self._min_tokens
            _set(mask, end, False)
            for token in self._stops:
                _set(mask, token, bool(may_end))
            if bytes(mask) == bytes(width):  # a memoryview compares byte by byte
                mask[:] = b"\xff" * width

    def _reason(self) -> str:
        if self.core.is_error() and "satisfy the grammar" not in (reason := one_line(self.core.get_error())):
            return f"{FIELD}: {reason}"
        return f"{FIELD}: {DEAD_END}"


def _set(mask: memoryview, bit: int, on: bool) -> None:
    mask[bit >> 3] = mask[bit >> 3] | 1 << (bit & 7) if on else mask[bit >> 3] & ~(1 << (bit & 7))
