"""SentencePiece models of Mistral 7B and Llama 2, from a `tokenizer.model` file or from the pieces in a GGUF file.

SentencePiece puts a space in front of every text it encodes and takes it away when it decodes. Control pieces are never
produced from text.

A GGUF file holds a model's pieces, scores and types, the types numbered as in SentencePiece. So the model is put
together again and the library itself merges by score.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from engine import CheckpointError
from service.text.plain import require_utf8

_SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # sentencepiece_model.proto
_BPE = 2


class SentencePieceTokenizer:
    """`service.text.tokenizer.Tokenizer` over a SentencePiece model.

    Args:
        model: the serialised model.
        ends: ids of beginning and end of sequence; None = as the model says.

    Raises:
        CheckpointError: the bytes are not a SentencePiece model.
    """

    def __init__(self, model: bytes, ends: tuple[int | None, int | None] | None = None) -> None:
        self._core = sentencepiece.SentencePieceProcessor()
        try:
            self._core.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise CheckpointError(f"not a SentencePiece model: {error}".splitlines()[0]) from None
        self._size: int = self._core.GetPieceSize()
        self._pieces: list[str] = [self._core.IdToPiece(i) for i in range(self._size)]
        self.controls = {piece: i for i, piece in enumerate(self._pieces) if self._core.IsControl(i)}
        self._bytes = [self._piece_bytes(i) for i in range(self._size)]
        self._bos_id, self._eos_id = ends or (_or_none(self._core.bos_id()), _or_none(self._core.eos_id()))
        # A model without the dummy prefix writes no space in front of the first word.
        first = self._core.EncodeAsIds("a")
        self._prefixes = bool(first) and self._pieces[first[0]].startswith(_SPACE)

    @property
    def vocab_size(self) -> int:
        return self._size

    @property
    def bos_id(self) -> int | None:
        return self._bos_id

    @property
    def eos_id(self) -> int | None:
        return self._eos_id

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        require_utf8(text, "prompt")
        ids: list[int] = self._core.EncodeAsIds(text)
        return [self._bos_id, *ids] if add_bos and self._bos_id is not None else ids

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


def from_pieces(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    ends: tuple[int | None, int | None],
    add_space_prefix: bool,
) -> SentencePieceTokenizer:
    """Tokenizer from what a GGUF file says (`tokenizer.ggml.tokens`, `scores`, `token_type`).

    Pieces that a user added to the vocabulary would be found in any text; they become control pieces, which only ids
    and templates reach. Those that are nothing but white space stay: they are vocabulary.

    Args:
        ends: ids of beginning and end of sequence, None for what no text gets.
        add_space_prefix: whether a space goes in front of every text.

    Raises:
        CheckpointError: the library takes no such model.
    """
    types = [
        _CONTROL if kind == _USER_DEFINED and not piece.replace(_SPACE, " ").isspace() else kind
        for piece, kind in zip(pieces, types, strict=True)
    ]
    unknown = types.index(_UNKNOWN) if _UNKNOWN in types else 0
    trainer = [
        _varint_field(3, _BPE),
        _varint_field(35, int(_BYTE in types)),  # byte_fallback
        _varint_field(40, unknown),
        _bytes_field(45, pieces[unknown].encode() if pieces else b""),
    ]
    normaliser = [_varint_field(3, int(add_space_prefix)), _varint_field(4, 0), _varint_field(5, 1)]
    listed = [
        _bytes_field(1, _bytes_field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + _varint_field(3, kind))
        for piece, score, kind in zip(pieces, scores, types, strict=True)
    ]
    return SentencePieceTokenizer(b"".join([*listed, _message(2, trainer), _message(3, normaliser)]), ends)


def _message(number: int, fields: Iterable[bytes]) -> bytes:
    return _bytes_field(number, b"".join(fields))


def _bytes_field(number: int, data: bytes) -> bytes:
    """A field of a protobuf message. Written out because the library's own stubs ask for a newer protobuf than ours."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])


def _or_none(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None
