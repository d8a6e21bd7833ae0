"""`tokenizer.json` of Hugging Face checkpoints through the `tokenizers` package: no text yields a control token.

`tokenizers` recognises added tokens inside any text. So the file is loaded without them, and they live in a table of
ours that only ids and templates reach. Kept are added tokens that are nothing but white space: they are vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from engine import CheckpointError, UnsupportedModelError
from service.text.bpe import byte_alphabet
from service.text.plain import require_utf8

_SPACE = "▁"


class HfTokenizer:
    """`service.text.tokenizer.Tokenizer` over a BPE `tokenizer.json`.

    Args:
        data: the parsed file; not changed.
        bos, eos: names of the control tokens, as tokenizer_config.json gives them.
        add_bos: whether texts begin with bos; None = as the file's post-processor says.

    Raises:
        CheckpointError: the file is inconsistent; UnsupportedModelError if it is no BPE.
    """

    def __init__(self, data: dict[str, Any], *, bos: str | None, eos: str | None, add_bos: bool | None) -> None:
        if data["model"].get("type", "BPE") != "BPE":
            raise UnsupportedModelError(f"tokenizer.json: model type {data['model']['type']!r} is not BPE")
        added = data.get("added_tokens") or []
        plain = [token for token in added if not token["special"] and token["content"].isspace()]
        self.controls = {str(t["content"]): int(t["id"]) for t in added if t not in plain}
        core = data | {"model": _model(data["model"], self.controls, plain)}
        core |= {"added_tokens": plain, "post_processor": None}
        self._core = _build(core)
        self._inside = _build(_never_prefix(core)) if '"prepend_scheme": "first"' in json.dumps(core) else self._core
        self._names = {token_id: name for name, token_id in self.controls.items()}
        spelled = {token_id: text for text, token_id in self._core.get_vocab(with_added_tokens=False).items()}
        spaces = {int(token["id"]): str(token["content"]).encode() for token in plain}
        self._size = max([*spelled, *spaces, *self._names]) + 1
        byte_level = '"ByteLevel"' in json.dumps([data.get("pre_tokenizer"), data.get("decoder")])
        spell = _byte_level_speller() if byte_level else _sentencepiece_bytes
        self._bytes = [
            b"" if i in self._names else spaces.get(i) or spell(spelled.get(i, "")) for i in range(self._size)
        ]
        first = self._core.encode("a", add_special_tokens=False).ids
        self._prefixes = bool(first) and self._bytes[first[0]].startswith(b" ")
        if add_bos is None:
            add_bos = bos is not None and bos in json.dumps(data.get("post_processor"), ensure_ascii=False)
        self._bos_id = self.controls.get(bos) if add_bos and bos is not None else None
        self._eos_id = self.controls.get(eos) if eos is not None else None

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
        ids: list[int] = self._core.encode(text, add_special_tokens=False).ids
        return [self._bos_id, *ids] if add_bos and self._bos_id is not None else ids

    def encode_inside(self, text: str) -> list[int]:
        """Ids of text after a control token: differs from `encode` where the first word of a whole text is prefixed."""
        require_utf8(text, "prompt")
        ids: list[int] = self._inside.encode(text, add_special_tokens=False).ids
        return ids

    def control_id(self, name: str) -> int | None:
        return self.controls.get(name)

    def token_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < self._size:
            raise ValueError(f"token id {token_id} is not in the vocabulary (0 to {self._size - 1})")
        return self._bytes[token_id]

    def token_name(self, token_id: int) -> str:
        return self._names.get(token_id) or self.token_bytes(token_id).decode("utf-8", "replace")

    def decode(self, token_ids: Sequence[int]) -> str:
        text = b"".join([self.token_bytes(token_id) for token_id in token_ids]).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._prefixes else text


def load_hf(path: Path, config: dict[str, Any]) -> HfTokenizer:
    """Tokenizer of a `tokenizer.json`; `config` is the parsed tokenizer_config.json beside it, or empty.

    Raises:
        CheckpointError: the file is missing or not what it should be.
    """
    add_bos = config.get("add_bos_token")
    try:
        return HfTokenizer(
            json.loads(path.read_bytes()),
            bos=token_text(config.get("bos_token")),
            eos=token_text(config.get("eos_token")),
            add_bos=add_bos if isinstance(add_bos, bool) else None,
        )
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        line = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise CheckpointError(f"{path}: not a tokenizer: {line}") from None


def token_text(token: object) -> str | None:
    """Spelling of a token in tokenizer_config.json: a string, or an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _build(data: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(data | {"truncation": None, "padding": None}))
    except Exception as error:  # the package raises nothing narrower
        raise CheckpointError(f"tokenizer.json: {error}".splitlines()[0][:200]) from None


def _model(model: dict[str, Any], controls: dict[str, int], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """`model` with another vocabulary: without control tokens, where a whole word that spells one could find it, and
    with plain added tokens, which `tokenizers` would number anew if it did not find them there."""
    keep = model.get("unk_token")
    vocab = {text: token_id for text, token_id in model["vocab"].items() if text not in controls or text == keep}
    return model | {"vocab": vocab | {token["content"]: token["id"] for token in plain}}


def _never_prefix(data: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(data).replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    never: dict[str, Any] = json.loads(text)
    return never


def _byte_level_speller() -> Any:
    values = {char: value for value, char in enumerate(byte_alphabet())}
    return lambda text: bytes(values[char] for char in text)


def _sentencepiece_bytes(text: str) -> bytes:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes([int(text[3:5], 16)])
    return text.replace(_SPACE, " ").encode()
