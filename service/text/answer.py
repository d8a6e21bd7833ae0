"""The tokens of one completion to text, calls of tools, and the point where a stop string ends it.

    ids ──detokenize──► text ──tools──► text outside of calls ──stop strings──► text
                                  └───► pieces of calls

Stop strings are looked for in what is text to the client: the JSON of a call may hold any of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from service.text.chat import ToolCallDelta
from service.text.detokenize import StreamDecoder
from service.text.stop import StopMatcher
from service.text.tokenizer import Tokenizer
from service.text.tools.format import ToolParser


class AnswerReader:
    """Reads one completion.

    Args:
        before: the last id of the prompt.
        tools: None if the model was offered none, so that whatever it writes is text.
    """

    def __init__(
        self, tokenizer: Tokenizer, before: Sequence[int], stop: StopMatcher, tools: ToolParser | None
    ) -> None:
        self._vocab_size = tokenizer.vocab_size
        self._decoder = StreamDecoder(tokenizer, self._with_text(before))
        self._stop = stop
        self._tools = tools

    @property
    def ended(self) -> bool:
        """A stop string is complete, or the only call that is allowed."""
        return self._stop.matched is not None or (self._tools is not None and self._tools.spoken.closed)

    @property
    def matched_stop(self) -> str | None:
        return self._stop.matched

    @property
    def calls(self) -> int:
        """How many calls have begun."""
        return 0 if self._tools is None else self._tools.spoken.calls

    def push(self, ids: list[int], *, last: bool) -> tuple[str, list[int], list[ToolCallDelta]]:
        """Text and calls that became certain, and those of the ids that the completion keeps: none after its end.

        Args:
            last: no more ids will come.
        """
        pieces: list[str] = []
        calls: list[ToolCallDelta] = []
        for count, token in enumerate(ids, start=1):
            text = self._decoder.push(self._with_text([token]))
            if self._tools is None:
                pieces.append(self._stop.push(text))
            else:
                self._hear(self._tools.push(token, text), pieces, calls)
            if self.ended:
                return "".join(pieces), ids[:count], calls
        if last:
            text = self._decoder.flush()
            if self._tools is None:
                pieces.append(self._stop.push(text))
            else:
                self._hear(self._tools.push(-1, text), pieces, calls)
                self._hear(self._tools.finish(), pieces, calls)
            pieces.append(self._stop.flush())
        return "".join(pieces), ids, calls

    def _hear(self, said: tuple[str, list[ToolCallDelta]], pieces: list[str], calls: list[ToolCallDelta]) -> None:
        text, deltas = said
        pieces.append(self._stop.push(text))
        if deltas and self._stop.matched is None:
            pieces.append(self._stop.flush())  # no stop string reaches from before a call to behind it
            calls += deltas

    def _with_text(self, ids: Sequence[int]) -> list[int]:
        """Without ids that pad the embedding matrix to a round size: the tokenizer does not know them."""
        return [token for token in ids if token < self._vocab_size]
