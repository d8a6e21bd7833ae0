"""Logprobs as OpenAI spells them: a list of tokens for chats, four parallel lists for completions."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import msgspec

from engine import TokenLogprob
from service.host import Host

IMPOSSIBLE = -9999.0  # what OpenAI writes for minus infinity, which JSON does not have


class TopLogprob(msgspec.Struct, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, kw_only=True):
    content: list[ChatLogprob]
    refusal: None = None


class LegacyLogprobs(msgspec.Struct, kw_only=True):
    """Of the tokens of a text; the first one of a prompt has none. `text_offset` counts characters of the text."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []

    def extend(self, other: LegacyLogprobs) -> None:
        self.tokens += other.tokens
        self.token_logprobs += other.token_logprobs
        self.top_logprobs += other.top_logprobs
        self.text_offset += other.text_offset


class Spelling:
    """How tokens are written.

    Args:
        as_ids: every token as "token_id:ID", which vLLM does on request.
    """

    def __init__(self, host: Host, *, as_ids: bool = False) -> None:
        self._host = host
        self._as_ids = as_ids

    def text(self, token: int, prefix: str = "") -> str:
        r"""The token's text; bytes that are no whole characters as \xe2\x82, control tokens by their names."""
        if self._as_ids:
            return f"token_id:{token}"
        data = self._host.token_bytes(token)
        try:
            return data.decode() or self._host.token_name(token)
        except UnicodeDecodeError:
            return prefix + "".join(f"\\x{byte:02x}" for byte in data)

    def chat(self, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs:
        return ChatLogprobs(
            content=[
                ChatLogprob(
                    token=self.text(each.token_id),
                    logprob=_number(each.logprob),
                    bytes=list(self._host.token_bytes(each.token_id)),
                    top_logprobs=[
                        TopLogprob(
                            token=self.text(token), logprob=_number(value), bytes=list(self._host.token_bytes(token))
                        )
                        for token, value in each.top
                    ],
                )
                for each in logprobs
            ]
        )


class LegacyWriter:
    """Logprobs of one text, part by part.

    Args:
        text_begins_with: the text's beginning, if it is known. SentencePiece writes a space before a first word, which
            the text does not have.
    """

    def __init__(self, spelling: Spelling, host: Host, text_begins_with: str | None = None) -> None:
        self._spelling = spelling
        self._host = host
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0
        self._begins_with = text_begins_with

    def first(self, token: int) -> LegacyLogprobs:
        """The first token of a prompt: nothing comes before it that it could be likely after."""
        return LegacyLogprobs(
            tokens=[self._spelling.text(token, "bytes:")],
            token_logprobs=[None],
            top_logprobs=[None],
            text_offset=[self._advance(token)],
        )

    def write(self, logprobs: Sequence[TokenLogprob]) -> LegacyLogprobs:
        written = LegacyLogprobs()
        for each in logprobs:
            name = self._spelling.text(each.token_id, "bytes:")
            top: dict[str, float] = {}
            for token, value in (*each.top, (each.token_id, each.logprob)):  # the likeliest of those spelt alike
                top.setdefault(self._spelling.text(token, "bytes:"), _number(value))
            written.tokens.append(name)
            written.token_logprobs.append(_number(each.logprob))
            written.top_logprobs.append(top)
            written.text_offset.append(self._advance(each.token_id))
        return written

    def _advance(self, token: int) -> int:
        """Where the token begins; counts its characters for the next one."""
        at = self._offset
        text = self._decoder.decode(self._host.token_bytes(token))
        if text and self._begins_with is not None:
            if text.startswith(" ") and not self._begins_with.startswith(" "):
                text = text[1:]
            self._begins_with = None
        self._offset += len(text)
        return at


def _number(logprob: float) -> float:
    return max(logprob, IMPOSSIBLE)
