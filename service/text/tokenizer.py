"""What every tokenizer can do, and what a model's text side consists of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from service.text.chat import Conversation
from service.text.tools.format import ToolFormat


class Tokenizer(Protocol):
    """Text to ids and back. Control tokens come from ids or templates only: `encode` never produces one from text."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """Ids of `text`, all of it ordinary text; the beginning-of-sequence id in front if asked."""

    def control_id(self, name: str) -> int | None:
        """Id of the control token spelled `name` (`[INST]`, `<|im_end|>`), None if there is none."""

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that the token adds to a text; may be part of a character; empty for control tokens.

        Raises:
            ValueError: the id is not in the vocabulary.
        """

    def token_name(self, token_id: int) -> str:
        """Readable spelling for logs and logprobs, control tokens by their name."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a whole sequence; malformed UTF-8 becomes U+FFFD; control tokens vanish."""


class ChatTemplate(Protocol):
    """A conversation to token ids, at token level: text of users is encoded as text, whatever it spells."""

    def encode(self, conversation: Conversation) -> list[int]:
        """Ids of the whole prompt, ready for the model to answer.

        Raises:
            ServiceError: INVALID_ARGUMENT naming the message or tool at fault.
        """


@dataclass(frozen=True, slots=True)
class TextModel:
    """The text side of a model. `chat` is None for base models; `stop_ids` end an answer besides eos; `tools` is how it
    calls tools, None if in no way that we know."""

    tokenizer: Tokenizer
    chat: ChatTemplate | None
    stop_ids: tuple[int, ...] = ()
    tools: ToolFormat | None = None
