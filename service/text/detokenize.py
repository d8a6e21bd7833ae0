"""Token ids to text as they arrive. Invariant: the pieces concatenate to exactly `Tokenizer.decode` of all ids.

A token may end inside a character (61 % of tokens do in emoji-rich Tekken text), so bytes go through an incremental
UTF-8 decoder: O(1) per token, never half a character, malformed bytes become U+FFFD as in a whole decode.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from service.text.tokenizer import Tokenizer


class StreamDecoder:
    """Text of one completion, piece by piece.

    SentencePiece vocabularies write a space in front of the first word of every text. It is dropped where a text
    begins: at the very start or after a control token (`[/INST]`), not where a completion continues a raw prompt.

    Args:
        tokenizer: whose ids will be pushed.
        prompt: ids that stand before the first pushed one; only the last one matters.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = not prompt or not tokenizer.token_bytes(prompt[-1])

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that became certain with these tokens; may be empty.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        if len(token_ids) == 1:  # as nearly always
            return self._decoder.decode(self._bytes(token_ids[0]))
        return self._decoder.decode(b"".join([self._bytes(token_id) for token_id in token_ids]))

    def flush(self) -> str:
        """What remains when no more tokens come: U+FFFD for an unfinished character, else nothing."""
        return self._decoder.decode(b"", final=True)

    def _bytes(self, token_id: int) -> bytes:
        data = self._tokenizer.token_bytes(token_id)
        if self._at_start and data:
            self._at_start = False
            shown = self._tokenizer.decode([token_id])  # as the beginning of a text
            if data.startswith(b" ") and len(shown) < len(data.decode("utf-8", "replace")):
                return data[1:]
        return data
