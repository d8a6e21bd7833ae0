"""SentencePiece models (`tokenizer.model`) of Mistral 7B and Llama 2.

SentencePiece puts a space in front of every text it encodes and takes it away when it decodes. Control pieces are never
produced from text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from engine import CheckpointError
from service.text.plain import require_utf8

_SPACE = "▁"


class SentencePieceTokenizer:
    """`service.text.tokenizer.Tokenizer` over a SentencePiece model.

    Args:
        model: the serialised model.

    Raises:
        CheckpointError: the bytes are not a SentencePiece model, or one with pieces that text could forge.
    """

    def __init__(self, model: bytes) -> None:
        self._core = sentencepiece.SentencePieceProcessor()
        try:
            self._core.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise CheckpointError(f"not a SentencePiece model: {error}".splitlines()[0]) from None
        self._size: int = self._core.GetPieceSize()
        self._pieces: list[str] = [self._core.IdToPiece(i) for i in range(self._size)]
        self.controls = {piece: i for i, piece in enumerate(self._pieces) if self._core.IsControl(i)}
        self._bytes = [self._piece_bytes(i) for i in range(self._size)]
        # A model without the dummy prefix writes no space in front of the first word.
        self._prefixes = self._pieces[self._core.EncodeAsIds("a")[0]].startswith(_SPACE)

    @property
    def vocab_size(self) -> int:
        return self._size

    @property
    def bos_id(self) -> int | None:
        return self._core.bos_id() if self._core.bos_id() >= 0 else None

    @property
    def eos_id(self) -> int | None:
        return self._core.eos_id() if self._core.eos_id() >= 0 else None

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        require_utf8(text, "prompt")
        ids: list[int] = self._core.EncodeAsIds(text)
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def control_id(self, name: str) -> int | None:
        return self.controls.get(name)

    def token_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < self._size:
            raise ValueError(f"token id {token_id} is not in the vocabulary (0 to {self._size - 1})")
        return self._bytes[token_id]

    def token_name(self, token_id: int) -> str:
        self.token_bytes(token_id)
        return self._pieces[token_id].replace(_SPACE, " ")

    def decode(self, token_ids: Sequence[int]) -> str:
        text = b"".join([self.token_bytes(token_id) for token_id in token_ids]).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._prefixes else text

    def _piece_bytes(self, token_id: int) -> bytes:
        if self._core.IsControl(token_id) or self._core.IsUnused(token_id):
            return b""
        if self._core.IsByte(token_id):
            return bytes([int(self._pieces[token_id][3:-1], 16)])  # <0x0A>
        if self._core.IsUnknown(token_id):
            return " \u2047 ".encode()  # as SentencePiece shows it
        return self._pieces[token_id].replace(_SPACE, " ").encode()


def load_sentencepiece(path: Path) -> SentencePieceTokenizer:
    """Tokenizer of a `tokenizer.model` file.

    Raises:
        CheckpointError: the file is missing or not a SentencePiece model.
    """
    try:
        return SentencePieceTokenizer(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
